"""What is checked before a commit is what launch/test.sh checks."""

import yaml
from conftest import ROOT


def test_hooks_and_script_name_the_same_checks():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # nothing is cloned from elsewhere
    hooks = {hook["entry"].replace(".venv/bin/", "") for hook in repository["hooks"]}
    before_the_tests = (ROOT / "launch" / "test.sh").read_text().partition("python -m pytest")[0].splitlines()
    checks = {line for line in before_the_tests if line.startswith(("ruff ", "python ", "shellcheck "))}
    assert hooks == {"shellcheck -x" if line.startswith("shellcheck") else line for line in checks}  # a hook is given the files
