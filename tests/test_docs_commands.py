"""The commands of the documentation: every one composes, and those that need no other data or devices run, made tiny."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_readme import blocks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = [ROOT / "conf" / "prune.yaml", *sorted((ROOT / "conf" / "experiment").glob("*.yaml"))]
TINY = [
    "data.subset=250", "dense.max_epochs=1", "trainer.max_epochs=1", "trainer.accelerator=cpu", "measure.seconds=0.02",
    "trainer.limit_test_batches=1", "trainer.limit_val_batches=1", "trainer.enable_progress_bar=false",
    "callbacks.progress=null", "sweep.controls=[]",
]  # fmt: skip
# what these ask for is not there in a test: other data, devices, packages, or a run that was cut off
ELSEWHERE = (
    "mnist", "fashion", "cifar10", "trainer=gpu", "trainer=ddp", "trainer=fsdp", "submitit", "launcher=ray", "resume=", "srun",
    "...", "$LIGHTNING_PRUNE_DATA", "chita_resnet20", "data.root=DIR",
)  # fmt: skip
NEEDS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "search.knobs": "optuna"}  # a word of the command: a package
DRIVER = """
import json, sys, traceback
from lightning_prune import cli, sweep
from hydra.core.global_hydra import GlobalHydra
failed = {}
for line in json.loads(sys.stdin.read()):
    GlobalHydra.instance().clear()
    sys.argv = line
    try:
        code = sweep.main(line[1:]) if line[0].endswith("sweep") else cli.main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        code = traceback.format_exc()
    if line[0].endswith("sweep") or isinstance(code, (str, int)):
        if code not in (0, None) and not isinstance(code, float):
            failed[" ".join(line)] = str(code)
print("RESULT" + json.dumps(failed))
"""


def commands(page: Path) -> list[list[str]]:
    """Return the `lightning-prune` commands of a page as lists of words: those of blocks, and those within sentences."""
    text = page.read_text(encoding="utf-8")
    found = []
    for _, code in blocks(text, "bash"):
        for line in re.sub(r"\\\n\s*", " ", code).splitlines():
            if re.match(r"\s*(srun )?lightning-prune", line):
                found.append(shlex.split(line, comments=True))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found += [shlex.split(code) for code in re.findall(r"`(lightning-prune [^`]*[=-][^`]*)`", prose)]
    return found


def commands_of_file(path: Path) -> list[list[str]]:
    """Return the commands that a configuration opens with, or that its help shows with an explanation beside each."""
    lines = re.findall(r"^(?:# |\s+)(lightning-prune(?: .+)?)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(re.split(r"\s{2,}", line)[0]) for line in lines]


EVERY = [
    *((page, words) for page in PAGES for words in commands(page)),
    *((path, words) for path in FILES for words in commands_of_file(path)),
]


def name_of(value: Any) -> str:
    return value.stem if isinstance(value, Path) else " ".join(value[1:])[:60]


def jobs(words: list[str]) -> list[list[str]]:
    """The overrides of every job of a command."""
    overrides = [word for word in words[(words[0] == "srun" and 2) or 1 :] if word not in ("-m", "...", "--cfg", "job")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    batches = BasicSweeper.split_arguments(parsed, None) if "-m" in words else [[overrides]]
    return [job for batch in batches for job in batch]


@pytest.mark.parametrize(
    ("page", "words"),
    [(page, words) for page, words in EVERY if words[0] != "lightning-prune-sweep" and "help" not in words[-1]],
    ids=name_of,
)
def test_every_command_composes(page: Path, words: list[str]) -> None:
    every = jobs(words)
    for job in every if len(every) < 3 else [every[0], every[-1]]:
        kept = [word for word in job if not word.startswith(("hydra/launcher", "hydra.launcher"))]
        with initialize_config_module("lightning_prune.conf", version_base="1.3"):
            cfg = compose("prune", overrides=kept, return_hydra_config=True)
        assert cfg.seed >= 0


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    with (
        initialize_config_module("lightning_prune.conf", version_base="1.3"),
        pytest.raises(Exception, match="sparsty"),
    ):
        compose("prune", overrides=["callbacks.pruning.sparsty=0.5"])


def test_the_documentation_has_commands() -> None:
    assert len(EVERY) > 100
    known = {"README.md", "cli.md", "sweeps.md", "search.md", "hydra.md", "scale.md", "faq.md", "prune.yaml"}
    assert {page.name for page, _ in EVERY} >= known
    assert all(len(commands_of_file(path)) >= 1 for path in FILES)  # an experiment opens with its command


def tiny(words: list[str]) -> list[str]:
    """Make a command small: fewer values to sweep, fewer samples and epochs."""
    if words[0] == "lightning-prune-sweep":
        return words
    made = []
    for word in words:
        key, _, value = word.partition("=")
        if "-m" in words and "," in value and not re.search(r"[\[{]", value):
            value = ",".join(value.split(",")[: 2 if key == "pruning" else 1])
            if key.startswith("callbacks.pruning."):
                value = f"choice({value})"  # still a sweep: Hydra tries what is not swept with the default method
        made.append(f"{key}={value}" if "=" in word else word)
    search = ["search.max_evaluations=2"] if any(word.startswith("search.") for word in words) else []
    study = ["search.trials=1"] if any(word.startswith("search.knobs") for word in words) else []
    own = ["data.subset=null"] if any(word.startswith("experiment") for word in words) else []
    rounds = ["trainer.max_epochs=5"] if any(word.startswith("callbacks.pruning.at=[[") for word in words) else []
    place = next((index for index, word in enumerate(made) if word.startswith("--")), len(made))
    return [
        *made[:place],
        *TINY,
        *search,
        *study,
        *own,
        *rounds,
        *made[place:],
    ]  # overrides stand together, options after them


def runnable(written: list[list[str]]) -> list[list[str]]:
    """The commands that can run here, made tiny, each once."""
    missing = [mark for mark, package in NEEDS.items() if importlib.util.find_spec(package) is None]
    found = []
    for words in written:
        text = " ".join(words)
        if not any(mark in text for mark in (*ELSEWHERE, *missing)) and tiny(words) not in found:
            found.append(tiny(words))
    return found


def run_all(lines: list[list[str]], folder: Path) -> dict[str, str]:
    """Run commands one after the other in one process; return what each that failed said."""
    (folder / "my_package.py").write_text(
        "from torch import nn\n"
        "class MyNet(nn.Sequential):\n"
        "    def __init__(self, width):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    first = [  # they leave the files that others start from
        ["lightning-prune", "pruning=none", "hydra.run.dir=.", *TINY],
        ["lightning-prune", "pruning=none", "hydra.run.dir=runs/dense/0", *TINY],
        ["lightning-prune", "pruning=pfp", "hydra.run.dir=runs/small", *TINY],
    ]
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps([*first, *lines]), cwd=folder, capture_output=True, text=True,
        timeout=1700, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "RESULT" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT")[2])


def of_guides(place: Path) -> bool:
    return place.parent.name in ("guides", "tutorials")


@pytest.mark.timeout(900)
def test_the_commands_of_guides_and_tutorials_run(tmp_path: Path) -> None:
    lines = runnable([words for place, words in EVERY if of_guides(place)])
    assert len(lines) >= 10
    failed = run_all(lines, tmp_path)
    assert not failed, json.dumps(failed, indent=1)
    assert (tmp_path / "runs" / "digits" / "sweep.md").exists()
    assert (tmp_path / "runs" / "search" / "search.md").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_all_other_pages_run(tmp_path: Path) -> None:
    lines = runnable([words for place, words in EVERY if not of_guides(place)])
    assert len(lines) >= 40
    failed = run_all(lines, tmp_path)
    assert not failed, json.dumps(failed, indent=1)
