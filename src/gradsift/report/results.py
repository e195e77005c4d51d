"""The results of one run, collected as its stages finish, and their `run.json`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact, Store
from gradsift.config import ProxyConfig
from gradsift.data.load import SPOILT, Labels, labels_of
from gradsift.data.verifiable import effective_families
from gradsift.diagnostics import read_diagnostics
from gradsift.evaluation.stages.forgetting import General, forgetting_of
from gradsift.evaluation.stages.judging import pws_of
from gradsift.evaluation.stages.losses import heldout_loss_of
from gradsift.evaluation.stages.metrics import metrics_of
from gradsift.names import require_no_link
from gradsift.report.audit_tables import AUDIT_FILE
from gradsift.report.work import work_of
from gradsift.runtime import peak_memory
from gradsift.scoring.scores import SCORED
from gradsift.scoring.stage import SCORES_FILE, scores_of
from gradsift.selection.stage import SELECTION_FILE, positions_of
from gradsift.tracking import Tracker
from gradsift.training.curves import read_curve

RUN_FILE = "run.json"
_COUNTS = ("optimizer_steps", "forward_tokens")  # of a stage's info, what is told with the stages


@dataclass
class Results:
    """Everything `run.json` says besides the stages; a value is there once its stage is done."""

    folder: Path
    tracker: Tracker
    store: Store
    about: dict[str, Any]  # what tells this run from others
    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # what a person may want to open
    ends_early: bool = False
    _started: float = field(default_factory=time.perf_counter)

    def loaded(self, artifact: Artifact) -> None:
        self.values["data"] = dict(artifact.info)
        if artifact.info["rejected"]:
            self.files["rejected rows"] = str(artifact.file("rejected.jsonl"))

    def collected(self, proxy: ProxyConfig, missing: Sequence[int]) -> None:
        """One shard of the norms is there; `missing` are those that other jobs have not yet made."""
        self.values["shards"] = {"collected": proxy.shard, "of": proxy.shards, "missing": list(missing)}
        said = f"  shard {proxy.shard} of {proxy.shards} is collected (they count from 0); "
        said += f"still missing: {', '.join(map(str, missing))}; " if missing else "none is missing; "
        self.store.say(said + "the same command without proxy.shard goes on with all of them")

    def scored(self, artifact: Artifact) -> None:
        statuses = {k: v for k, v in artifact.info.items() if k not in ("rows", *_COUNTS)}
        self.values["scores"] = {"rows": artifact.info["rows"], "statuses": statuses}
        self.files["scores"] = str(artifact.file(SCORES_FILE))
        self.tracker.artifact(artifact, SCORES_FILE)
        scores = scores_of(artifact)
        reasons: dict[str, int] = {}
        for reason in scores.reason[scores.status != SCORED]:
            reasons[reason] = reasons.get(reason, 0) + 1
        if reasons:
            self.values["scores"]["reasons"] = reasons
        self._diagnosed(artifact)

    def selected(self, artifact: Artifact, loaded: Artifact) -> None:
        info = {k: v for k, v in artifact.info.items() if k not in _COUNTS}
        labels = labels_of(loaded)
        if labels is not None:
            info |= composition(labels, positions_of(artifact).tolist())
        self.values["selection"] = info
        self._diagnosed(artifact)
        shutil.copyfile(artifact.file(SELECTION_FILE), self.folder / SELECTION_FILE)
        self.files["selection"] = str(self.folder / SELECTION_FILE)
        self.tracker.artifact(artifact, SELECTION_FILE)

    def audited(self, found: Callable[[], dict[str, Any]]) -> None:
        """`audit.json` holds all of it, `run.json` all but the positions that were selected."""
        audit = found()
        (self.folder / AUDIT_FILE).write_text(json.dumps(audit, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        short = [{k: v for k, v in cell.items() if k != "positions"} for cell in audit["selections"]]
        self.values["audit"] = audit | {"selections": short}
        self.files["audit"] = str(self.folder / AUDIT_FILE)

    def _diagnosed(self, artifact: Artifact) -> None:
        found = self.values.setdefault("diagnostics", {})
        found |= read_diagnostics(artifact.path)
        self.values["warnings"] = sum(diagnostic["verdict"] == "warning" for diagnostic in found.values())

    def finetuned(self, artifact: Artifact, heldout_loss: Artifact | None) -> None:
        self.values["heldout_loss"] = {"model": heldout_loss_of(heldout_loss)}
        self.files["adapter"] = str(artifact.file("adapter"))
        curve = read_curve(artifact.path)
        self.tracker.curve("finetune", curve)
        self.values["final_training_loss"] = _tail_mean([entry["loss"] for entry in curve])

    def answered(self, metrics: Artifact | None) -> None:
        self._measured("model", metrics_of(metrics))
        by_benchmark = self.values["accuracy"]["by_benchmark"].get("model", {})
        if len(by_benchmark) > 1:
            self.values["accuracy"]["benchmarks"] = by_benchmark

    def _measured(self, model: str, metrics: dict[str, Any] | None) -> None:
        """Metrics of the answers of the model, the reference or the untuned target; None without reference answers."""
        accuracy = self.values.setdefault("accuracy", {"by_benchmark": {}})
        accuracy[model] = None if metrics is None else metrics["pooled"]["accuracy"]
        if metrics is not None:
            by_set = metrics["benchmarks"]
            accuracy["by_benchmark"][model] = {name: found["accuracy"] for name, found in by_set.items()}
            self.values.setdefault("metrics", {})[model] = metrics

    def forgot(self, states: tuple[General, General]) -> None:
        self.values["forgetting"] = forgetting_of(states)

    def is_reference(self) -> None:
        self.values["pws"] = 1.0
        self.values["pws_by_definition"] = True

    def dry_run(self, said: str) -> None:
        """A dry run of the judge ends here: what it would have sent."""
        self.values["dry_run"] = said
        self.ends_early = True

    def judged(self, pws: Artifact, artifact: Artifact) -> None:
        summary = pws_of(pws)
        self.values["pws"] = summary["pooled"]["pws"]
        self.values["pooled"] = summary["pooled"]
        self.values["benchmarks"] = summary["benchmarks"]
        self.values |= {name: summary[name] for name in ("position_bias", "length_bias")}
        self.values["judging"] = {key: artifact.info[key] for key in ("invalid", "cost") if key in artifact.info}
        self.files["judgments"] = str(artifact.file("judgments.jsonl"))

    def reference(self, heldout_loss: Artifact | None, metrics: Artifact | None) -> None:
        self.values["heldout_loss"]["reference"] = heldout_loss_of(heldout_loss)
        self._measured("reference", metrics_of(metrics))

    def untuned(self, heldout_loss: Artifact | None, metrics: Artifact | None) -> None:
        self.values["heldout_loss"]["untuned"] = heldout_loss_of(heldout_loss)
        self._measured("untuned", metrics_of(metrics))

    def ensemble(self, members: Sequence[Sequence[Artifact]]) -> None:
        for number, chain in enumerate(members):
            curves = [entry for artifact in chain for entry in read_curve(artifact.path)]
            self.tracker.curve(f"member_{number}", [entry | {"batch": index} for index, entry in enumerate(curves)])

    def value_of(self, objective: str) -> float | None:
        """The pooled PWS, or the tuned target's accuracy or held-out loss; None where the run has none."""
        found = self.values.get(objective)
        value = found.get("model") if isinstance(found, dict) else found
        return None if value is None else float(value)

    def finish(self, status: str, error: str | None = None) -> None:
        """Write `run.json` and the summary; `status` is finished, stopped, failed or interrupted."""
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


def composition(labels: Labels, positions: list[int]) -> dict[str, Any]:
    """Shares of the quality labels among the selected examples, and their effective number of families."""
    quality = [labels.quality[position] for position in positions]
    shares = {name: quality.count(name) / len(quality) for name in sorted(set(labels.quality))}
    return {
        "labels": shares,
        "spoilt_share": sum(shares.get(name, 0.0) for name in SPOILT),
        "spoilt_share_pool": sum(labels.quality.count(name) for name in SPOILT) / len(labels.quality),
        **_families(labels.family, positions),
    }


def _families(family: list[str] | None, positions: list[int]) -> dict[str, float]:
    if family is None:
        return {}
    kept = [family[position] for position in positions]
    return {"families": effective_families(kept), "families_pool": effective_families(family)}


def _tail_mean(losses: list[float]) -> float:
    """Mean over the last tenth of the batches: single batches are noisy."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
