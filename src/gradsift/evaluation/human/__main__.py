"""Serve pairs of answers to raters; with `--results`, print the counts of their votes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradsift.config import in_range, require_bound
from gradsift.errors import ConfigError, command
from gradsift.evaluation.human.pairs import PairFiles, files_of_run, read_pairs
from gradsift.evaluation.human.votes import Votes, describe
from gradsift.evaluation.pws import Outcomes, outcomes_of
from gradsift.evaluation.records import read_records

DATABASE = "human_eval.sqlite"
PORT = 8765


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m gradsift.evaluation.human", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--model", type=Path, metavar="FILE", help="model_outputs.json of the model, instead of a run")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="model_outputs.json of the reference")
    parser.add_argument(
        "--judgments", type=Path, metavar="FILE", help="judgments.jsonl of an LLM judge (default: of the run)"
    )
    parser.add_argument("--database", type=Path, metavar="FILE", help=f"file of the votes (default: {DATABASE} in RUN)")
    parser.add_argument("--raters", metavar="A,B", help="who may vote, or whose votes are counted (default: anyone)")
    parser.add_argument("--items", type=int, help="number of pairs, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, help="seed of the draw, the order and the sides (default 0)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port on 127.0.0.1 (default {PORT}; 0: a free port)")
    parser.add_argument("--unblind", action="store_true", help="after Finish, show which answers were the model's")
    parser.add_argument("--plain", action="store_true", help="show texts as they are, without rendering Markdown")
    parser.add_argument("--results", action="store_true", help="print the counts as JSON instead of serving pages")
    parser.add_argument("--confidence", type=float, default=0.95, help="coverage of the intervals (default 0.95)")
    options = parser.parse_args(arguments)
    files = _files(options)
    path = options.database or (options.run or Path()) / DATABASE
    if options.results:
        print(json.dumps(_results(options, files, path), indent=1, allow_nan=False))
    else:
        _serve(options, files, path)


def _files(options: argparse.Namespace) -> PairFiles:
    named = (options.model is not None) + (options.reference is not None)
    if (options.run is None and named < 2) or (options.run is not None and named):
        raise ConfigError("give either the folder of a run, or two files with --model and --reference")
    in_range("--confidence", options.confidence, above=0, below=1)
    require_bound("--seed", options.seed or 0)
    files = files_of_run(options.run) if options.run else PairFiles(options.model, options.reference)
    return replace(files, judgments=options.judgments) if options.judgments else files


def _serve(options: argparse.Namespace, files: PairFiles, path: Path) -> None:
    try:
        from gradsift.evaluation.human.server import LOOPBACK, Pages, listen, serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the page needs the package {error.name}; install it with `pip install -c constraints.txt -e '.[human]'`"
        ) from error

    pairs = read_pairs(files)
    listener = listen(options.port)
    votes = Votes(path) if path.exists() else Votes.create(path, pairs, options.items, options.seed or 0)
    votes.require(pairs, options.items, options.seed)
    pages = Pages(votes, pairs, invited=_names(options.raters), unblind=options.unblind, plain=options.plain)
    port = listener.getsockname()[1]
    print(f"{len(votes.keys)} of {len(pairs.items)} pairs; votes are stored in {path}")
    print(f"open http://{LOOPBACK}:{port}{pages.root}/")
    print(
        f"(from another machine: ssh -L {port}:{LOOPBACK}:{port} THIS_MACHINE, then the same address; Ctrl-C stops)",
        flush=True,
    )
    serve(pages.app(), listener)
    votes.close()
    print("stopped; run the command again to continue, or with --results to print the counts")


def _results(options: argparse.Namespace, files: PairFiles, path: Path) -> dict[str, Any]:
    votes = Votes(path)
    if files.model.is_file() and files.reference.is_file():  # the store may be deleted before the votes are counted
        votes.require(read_pairs(files))
    else:
        print("note: the answers no longer exist, so they were not compared with those of the votes", file=sys.stderr)
    names = _names(options.raters)
    known = [rater.name for rater in votes.raters()]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--raters: nobody called {unknown[0]} has voted; raters: {', '.join(known) or 'none'}")
    judged: Outcomes | None = None
    if files.judgments is not None:
        records = read_records(files.judgments)
        judged = outcomes_of(records.judgments, records.combine)
    counted = [vote for vote in votes.all() if not names or vote.rater in names]
    about = {"model": votes.about["model"], "reference": votes.about["reference"], "items": len(votes.keys)}
    result = {**about, **describe(counted, judged, options.confidence)}
    pooled = result["majority"]["pooled"]
    if pooled["split"]:
        split = f"{pooled['split']} of {pooled['n']} pairs have no outcome that more than half of their raters chose"
        print(f"note: {split}; the PWS omits these pairs", file=sys.stderr)
    return result


def _names(raters: str | None) -> list[str]:
    return [] if raters is None else [" ".join(name.split()) for name in raters.split(",")]


if __name__ == "__main__":
    sys.exit(main())
