"""The demo's loop over regimes and sets, on demo:tiny: one folder a result, nothing run twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiltmeter import store
from tiltmeter.errors import DataError
from tiltmeter.geometry.objective import Passes
from tiltmeter.jobs.demo import line, run
from tiltmeter.jobs.estimate import Estimate
from tiltmeter.jobs.recipe import Lora, Recipe
from tiltmeter.jobs.subject import Options

RECIPES = {
    "lora": Recipe(learning_rate=1e-3, steps=4, batch_size=4, lora=Lora(2, 4.0, ("q_proj",))),
    "full": Recipe(learning_rate=1e-4, steps=4, batch_size=4),
}
SMALL = Options(max_safety=4, max_tuning=6, rank=1, response_tokens=8, grid=2)


class Silent:
    """Follows the work and prints nothing."""

    def __init__(self) -> None:
        self.prefix = ""
        self.stages: list[str] = []

    def report(self, stage: str) -> None:
        self.stages.append(self.prefix + stage)

    def announce(self, expected: Estimate) -> None:
        pass

    def listen(self, passes: Passes) -> None:
        pass


def demo(
    out: Path, ticker: Silent, tuning: tuple[str, ...] = ("demo:tiny-copy", "demo:tiny-known"), **more: Any
) -> Any:
    given = {"full": True, "seed": 0, "force": False, **more}
    return run(
        out, ticker=ticker, model="demo:tiny", safety="demo:tiny-safety", tuning=tuning, options=SMALL,
        recipes=RECIPES, **given,
    )  # fmt: skip


def test_every_set_is_assessed_once_under_every_recipe(tmp_path: Path) -> None:
    first = Silent()
    records = demo(tmp_path, first)
    names = ["lora-tiny-copy", "lora-tiny-known", "full-tiny-copy", "full-tiny-known"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for record, name in zip(records, names, strict=True):
        assert store.read_record(tmp_path / name)[0]["forecast"] == record["forecast"]
        assert f"{record['recipe']['regime']}-{record['tuning']['name'].removeprefix('demo:')}" == name
        assert record["verdict"]["kind"] in line(record)
        # the coupling of all parameters takes long: the demo leaves it to assess, and says so
        assert (record["aic"]["curvature_coupling"] is None) == name.startswith("full")
        assert record["aic"]["initial_overlap"] is not None
    assert first.stages.count("lora: answers of the aligned model") == 1
    assert not any("full" in stage and "answers" in stage for stage in first.stages)  # at B = 0 both answer alike

    again = Silent()
    assert [r["created"] for r in demo(tmp_path, again)] == [r["created"] for r in records]
    assert again.stages == []

    forced = demo(tmp_path, Silent(), ("demo:tiny-copy",), force=True, full=False)
    assert len(forced) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert store.read_record(tmp_path / "lora-tiny-copy")[0]["created"] == forced[0]["created"] > records[0]["created"]

    other = demo(tmp_path, Silent(), ("demo:tiny-copy",), seed=1, full=False)
    assert other[0]["seed"] == store.read_record(tmp_path / "lora-tiny-copy")[0]["seed"] == 1


def test_a_set_that_cannot_be_used_ends_the_demo_before_the_long_part(tmp_path: Path) -> None:
    ticker = Silent()
    with pytest.raises(DataError, match="demo:tiny-cop"):
        demo(tmp_path / "out", ticker, ("demo:tiny-known", "demo:tiny-cop"), full=False)
    assert ticker.stages == ["lora: loading the model"]
    assert list(tmp_path.iterdir()) == []
