"""Builds `run.json`, the record of one run. Each finished stage adds its results; the file is written at the end."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact, Store
from gradsift.config import ProxyConfig
from gradsift.cost import work_of
from gradsift.data.load import SPOILT, Labels, labels_of
from gradsift.data.tokens import REFUSED_FILE
from gradsift.data.verifiable import effective_families
from gradsift.diagnostics import DIAGNOSTICS_FILE, read_diagnostics
from gradsift.evaluation.stages.judging import pws_of
from gradsift.evaluation.stages.losses import heldout_loss_of
from gradsift.evaluation.stages.metrics import General, forgetting_of, metrics_of
from gradsift.names import require_no_link
from gradsift.run_folder import RUN_FILE
from gradsift.runtime import peak_memory
from gradsift.scoring.scores import SCORED
from gradsift.scoring.stage import SCORES_FILE, scores_of
from gradsift.selection.audit import AUDIT_FILE
from gradsift.selection.stage import SELECTION_FILE, positions_of
from gradsift.tracking import Tracker
from gradsift.training.optimization import read_curve


@dataclass
class RunRecord:
    """The content of `run.json`; each value is added when its stage is done."""

    folder: Path
    tracker: Tracker
    store: Store
    about: dict[str, Any]  # the settings that identify the run: scorer, alpha, seeds, overrides, ...
    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # paths shown to the user at the end
    _started: float = field(default_factory=time.perf_counter)

    def loaded(self, artifact: Artifact) -> None:
        self.values["data"] = dict(artifact.info)
        if artifact.info["rejected"]:
            self.files["rejected rows"] = str(artifact.file("rejected.jsonl"))

    def collected(self, proxy: ProxyConfig, missing: Sequence[int]) -> None:
        """Record that the gradient norms of the shard `proxy.shard` of the rows are collected.

        `missing` has the numbers of the shards whose norms are not collected yet.
        """
        self.values["shards"] = {"collected": proxy.shard, "of": proxy.shards, "missing": list(missing)}
        rest = f"still missing: {', '.join(map(str, missing))}" if missing else "none is missing"
        self.store.say(
            f"  shard {proxy.shard} of {proxy.shards} is collected (counted from 0); {rest}; "
            "run the same command without proxy.shard to continue with all shards"
        )

    def scored(self, artifact: Artifact) -> None:
        statuses = {k: v for k, v in _results_in(artifact).items() if k != "rows"}
        self.values["scores"] = {"rows": artifact.info["rows"], "statuses": statuses}
        scores = scores_of(artifact)
        if reasons := Counter(scores.reason[scores.status != SCORED].tolist()):
            self.values["scores"]["reasons"] = dict(reasons)
        self.files["scores"] = str(artifact.file(SCORES_FILE))
        self.tracker.artifact(artifact, SCORES_FILE)
        self._diagnosed(artifact)

    def refused(self, group: str, artifact: Artifact | None) -> None:
        """Record the rows that the chat template of `group` (proxy or target) cannot render."""
        if artifact is None or not artifact.info.get("refused"):
            return
        self.values.setdefault("refused", {})[group] = artifact.info["refused"]
        self.files[f"rows that {group}.template cannot show"] = str(artifact.file(REFUSED_FILE))

    def selected(self, artifact: Artifact, loaded: Artifact) -> None:
        info = _results_in(artifact)
        labels = labels_of(loaded)
        if labels is not None:
            info |= composition(labels, positions_of(artifact).tolist())
        if column := loaded.manifest["config"].get("source_column"):
            with artifact.file(SELECTION_FILE).open(encoding="utf-8") as lines:
                info["sources"] = dict(Counter(json.loads(line)[column] for line in lines))
        self.values["selection"] = info
        self._diagnosed(artifact)
        shutil.copyfile(artifact.file(SELECTION_FILE), self.folder / SELECTION_FILE)
        self.files["selection"] = str(self.folder / SELECTION_FILE)
        self.tracker.artifact(artifact, SELECTION_FILE)

    def exported(self, write: Callable[[Path], dict[str, str]]) -> None:
        """Call `write`, which writes files for other tools into the run's folder, and record the paths it returns."""
        self.files |= write(self.folder)

    def audited(self, compute: Callable[[], dict[str, Any]]) -> None:
        """Write the audit that `compute` returns to `audit.json`, and record it without the selected positions."""
        audit = compute()
        (self.folder / AUDIT_FILE).write_text(json.dumps(audit, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        selections = [{k: v for k, v in cell.items() if k != "positions"} for cell in audit["selections"]]
        self.values["audit"] = audit | {"selections": selections}
        self.files["audit"] = str(self.folder / AUDIT_FILE)

    def _diagnosed(self, artifact: Artifact) -> None:
        diagnostics = self.values.setdefault("diagnostics", {})
        diagnostics |= read_diagnostics(artifact.path)
        self.values["warnings"] = sum(diagnostic["verdict"] == "warning" for diagnostic in diagnostics.values())

    def finetuned(self, artifact: Artifact, heldout_loss: Artifact | None) -> None:
        self.values["heldout_loss"] = {"model": heldout_loss_of(heldout_loss)}
        if heldout_loss and (left_out := heldout_loss.info.get("left_out")):
            self.values["heldout_left_out"] = left_out
        self.refused("target", artifact)
        self.files["adapter"] = str(artifact.file("adapter"))
        curve = read_curve(artifact.path)
        self.tracker.curve("finetune", curve)
        tail = curve[-max(1, len(curve) // 10) :]  # the mean over the last tenth, as the loss of a batch is noisy
        self.values["final_training_loss"] = sum(entry["loss"] for entry in tail) / len(tail)

    def answered(self, artifact: Artifact | None, model: str = "model") -> None:
        """Record the metrics of a model's answers.

        Args:
            artifact: has the metrics; None if the benchmark has no reference answers.
            model: `model` (tuned on the selection), `reference` (tuned on all rows) or `untuned`.
        """
        metrics = metrics_of(artifact)
        accuracy = self.values.setdefault("accuracy", {"by_benchmark": {}})
        accuracy[model] = None if metrics is None else metrics["pooled"]["accuracy"]
        if metrics is not None:
            by_benchmark = {name: values["accuracy"] for name, values in metrics["benchmarks"].items()}
            accuracy["by_benchmark"][model] = by_benchmark
            if model == "model" and len(by_benchmark) > 1:
                accuracy["benchmarks"] = by_benchmark
            self.values.setdefault("metrics", {})[model] = metrics

    def compared(self, model: str, heldout_loss: Artifact | None, metrics: Artifact | None) -> None:
        """Record the held-out loss and the metrics of the model `reference` or `untuned` (see `answered`)."""
        self.values["heldout_loss"][model] = heldout_loss_of(heldout_loss)
        self.answered(metrics, model)

    def forgot(self, states: tuple[General, General]) -> None:
        self.values["forgetting"] = forgetting_of(states)

    def is_reference(self) -> None:
        self.values["pws"] = 1.0
        self.values["pws_by_definition"] = True

    def judged(self, pws: Artifact, artifact: Artifact) -> None:
        summary = pws_of(pws)
        self.values["pws"] = summary["pooled"]["pws"]
        of_pws = ("confidence", "pooled", "benchmarks", "outcomes", "position_bias", "length_bias", "length_controlled")
        self.values |= {name: summary[name] for name in of_pws if name in summary}
        self.values["judging"] = {key: artifact.info[key] for key in ("invalid", "cost") if key in artifact.info}
        if (pws.path / DIAGNOSTICS_FILE).exists():
            self._diagnosed(pws)
        self.files["judgments"] = str(artifact.file("judgments.jsonl"))

    def ensemble(self, members: Sequence[Sequence[Artifact]]) -> None:
        """Send the members' training curves to the tracker; `members[m][e - 1]` is member m's artifact of epoch e."""
        for number, epochs in enumerate(members):
            curve = [entry for artifact in epochs for entry in read_curve(artifact.path)]
            self.tracker.curve(f"member_{number}", [entry | {"batch": index} for index, entry in enumerate(curve)])

    def value_of(self, objective: str) -> float | None:
        """Return the finetuned target's `objective` (pws, accuracy or heldout_loss); None if it was not measured."""
        value = self.values.get(objective)
        if isinstance(value, dict):
            value = value.get("model")
        return None if value is None else float(value)

    def finish(self, status: str, error: str | None = None) -> None:
        """Write `run.json` and the tracker's summary; `status` is finished, stopped, failed or interrupted."""
        memory, stages = peak_memory(), self.store.records_as_dicts()
        content = {
            "status": status,
            **self.about,
            "seconds": round(time.perf_counter() - self._started, 3),
            "memory": memory,
            "work": work_of(stages),
            "stages": stages,
            **({"reused_from": sorted(self.store.other_code)} if self.store.other_code else {}),
            "pws": None,
            **self.values,
            "files": self.files,
            **({"error": error or status} if status in ("failed", "interrupted") else {}),
        }
        part = require_no_link(self.folder / f".{RUN_FILE}.part")
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.rename(self.folder / RUN_FILE)
        self.tracker.summary({**self.values, "memory": memory})


def _results_in(artifact: Artifact) -> dict[str, Any]:
    """Return an artifact's info without the counts that are already in `stages` of `run.json`."""
    return {name: value for name, value in artifact.info.items() if name not in ("optimizer_steps", "forward_tokens")}


def composition(labels: Labels, positions: list[int]) -> dict[str, Any]:
    """Return what the labels say about the selection (`positions` in the pool) and about the whole pool.

    The dict has the share of each quality label in the selection, and the share of corrupted examples in the selection
    and in the pool. If the labels name families, it also has the effective number of families in both.
    """
    quality = Counter(labels.quality[position] for position in positions)
    shares = {name: quality[name] / len(positions) for name in sorted(set(labels.quality))}
    parts: dict[str, Any] = {
        "labels": shares,
        "spoilt_share": sum(shares.get(name, 0.0) for name in SPOILT),
        "spoilt_share_pool": sum(labels.quality.count(name) for name in SPOILT) / len(labels.quality),
    }
    if labels.family is not None:
        parts["families"] = effective_families([labels.family[position] for position in positions])
        parts["families_pool"] = effective_families(labels.family)
    return parts
