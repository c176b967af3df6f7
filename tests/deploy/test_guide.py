"""The operator's guide says nothing that is not so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from model.families import read_config
from model.families.published import PUBLISHED
from model.kv_cache import bytes_per_block
from service.settings import Settings

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "deploy" / "README.md").read_text()


def test_its_flags_and_variables_exist() -> None:
    section = GUIDE[GUIDE.index("## Sizing") : GUIDE.index("## Upgrade")]
    commands = re.findall(r"`((?:vitrine|python -m) [^`]+)`", section)
    assert len(commands) >= 3
    for line in commands:
        assert flags_in(line) <= flags_in(help_of(line)), line
        section = section.replace(f"`{line}`", "")
    known = {name.replace("_", "-") for name in Settings.model_fields}
    flags = {flag.removeprefix("no-") for flag in flags_in(section)}
    assert "max-num-seqs" in flags
    assert flags <= known
    variables = set(re.findall(r"VITRINE_([A-Z_]+)", GUIDE))
    assert variables <= {name.upper() for name in Settings.model_fields}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--([a-z][a-z-]+)", text))


def help_of(line: str) -> str:
    """What `vitrine bench ...` or `python -m loadtests.limits ...` prints as its help."""
    words = line.split()
    command = words[:2] if words[0] == "vitrine" else words[1:3]
    program = ["-m", "service", *command[1:]] if words[0] == "vitrine" else command
    ran = subprocess.run(
        [sys.executable, *program, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
        check=True,
    )
    return ran.stdout


def test_its_example_of_sizing_is_right() -> None:
    config = read_config(PUBLISHED["qwen3-8b"])
    per_token = bytes_per_block(config, 1, torch.bfloat16)
    tokens = 50 * 2**30 // per_token
    assert f"= {per_token:,} bytes a token" in GUIDE
    assert f"{tokens:,} tokens, which is {tokens // 2000} sequences" in GUIDE


def test_its_paths_exist() -> None:
    for path in set(re.findall(r"`((?:deploy|tests)/[\w./-]+)`", GUIDE)):
        if not path.startswith("deploy/prometheus"):
            assert (ROOT / path).exists(), path


def test_every_alert_has_its_line() -> None:
    alerts = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    names = {rule["alert"] for group in alerts["groups"] for rule in group["rules"]}
    assert names == set(re.findall(r"^\| (Vitrine\w+) \|", GUIDE, re.MULTILINE))
