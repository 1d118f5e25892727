"""What a profile's results say of detection, made anew from its committed scores, without images or checkpoints."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from dgs.analysis.differences import difference_table, key_of
from dgs.analysis.metrics import (
    detection_table,
    metrics_of,
    per_seed_values,
    read_detection,
    summary,
    unique,
    write_detection,
)
from dgs.analysis.paper import suite_sections
from dgs.analysis.report import write_report
from dgs.analysis.scores import FILE, read_scores
from dgs.analysis.verdicts import FILE as VERDICTS
from dgs.analysis.verdicts import verdict_table
from dgs.errors import UserError
from dgs.tables import read_table
from dgs.workspace import MAIN

NEEDED = ("metrics.json", "detection.csv", "differences.csv", "forgetting.csv", "REPORT.md")
# Sections of a report that are no pivots of scores.
EXPERTS = "What experts read"
OTHERS = (EXPERTS, "Forgetting", "Figures", "How to read this", "What was run")


def renew(root: Path, profile: str) -> list[Path]:
    """Write what results/<profile> says of detection anew; returns the paths.

    These are detection.csv, differences.csv, verdicts.csv, metrics.json and REPORT.md. From scores.parquet: every
    number of detection. From the files themselves: which generators were seen, the data's hash, what was forgotten, and
    the report's sections `OTHERS` and its top. Files that say what the scores say keep their bytes.

    Raises:
        UserError: a file is missing, or the scores are no table of scores.
    """
    results = root / "results" / profile
    scores = read_scores(results / FILE)
    if missing := [name for name in NEEDED if not (results / name).is_file()]:
        how = "dvc repro" if profile == MAIN else f"make repro PROFILE={profile}"
        raise UserError(f"Expected {', '.join(missing)} in {results}, found none. Run {how} first.")
    before = read_detection(results / "detection.csv")
    detection = detection_table(scores, unique(before.loc[before["seen"], "generator"]))
    said = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    new = summary(detection, None, said["profile"], said["data_hash"])["methods"]
    said["methods"] = {name: {**said["methods"].get(name, {}), **numbers} for name, numbers in new.items()}
    forgetting = read_table(results / "forgetting.csv")
    differences = _differences(scores, detection, read_table(results / "differences.csv"))
    suites = suite_sections(detection, root)
    with tempfile.TemporaryDirectory(prefix=".from-scores-", dir=results) as name:
        draft = Path(name)
        write_detection(detection, draft / "detection.csv")
        differences.to_csv(draft / "differences.csv", index=False)
        verdicts = verdict_table(scores, unique(before.loc[before["seen"], "generator"]))
        verdicts.round(6).to_csv(draft / VERDICTS, index=False)
        (draft / "metrics.json").write_text(json.dumps(said, indent=1) + "\n")
        report = write_report(
            draft / "REPORT.md", said, detection, forgetting, {}, (), suites, "", differences, verdicts
        )
        old, new = (folder.joinpath("REPORT.md").read_text(encoding="utf-8") for folder in (results, draft))
        report.write_text(_spliced(old, new), encoding="utf-8", newline="\n")
        return [path.replace(results / path.name) for path in sorted(draft.iterdir())]


def _differences(scores: pd.DataFrame, detection: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """The table of `scores`, with the rows of `before` on what was forgotten, in the order of a run."""
    new = difference_table(per_seed_values(detection), detection, scores)
    keys = [key_of(*measure) for measure in zip(before["rate"], before["pictures"], strict=True)]
    kept = before[np.array([key in metrics_of("forgetting") for key in keys], dtype=bool)]
    if kept.empty:
        return new
    methods = {name: place for place, name in enumerate(unique(new["method"]))}
    return pd.concat([new, kept]).sort_values("method", key=lambda of: of.map(methods), kind="stable")


def _spliced(old: str, new: str) -> str:
    """The new report's sections, with the top and the sections `OTHERS` of the old one, in a report's order."""
    (top, *before), (_, *now) = (text.split("\n## ") for text in (old, new))
    kept = {part.partition("\n")[0]: part for part in before if part.partition("\n")[0] in OTHERS}
    fresh = {part.partition("\n")[0]: part for part in now if part.partition("\n")[0] not in OTHERS}
    order = [*fresh, *(title for title in OTHERS if title in kept)]
    if EXPERTS in kept:
        order.remove(EXPERTS)
        order.insert(order.index("Operating points"), EXPERTS)
    return "\n## ".join([top, *((fresh | kept)[title].rstrip("\n") + "\n" for title in order)])
