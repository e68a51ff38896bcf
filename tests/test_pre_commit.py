"""What is checked before a commit is what launch/test.sh checks."""

import yaml
from conftest import ROOT


def test_hooks_and_script_name_the_same_checks():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # nothing is cloned from elsewhere
    hooks = {hook["entry"].replace(".venv/bin/", "") for hook in repository["hooks"]}
    script = (ROOT / "launch" / "test.sh").read_text().partition("source launch/env.sh\n")[2].partition("export OMP_NUM_THREADS")[0]
    checks = {line.partition(" launch/*.sh")[0] for line in script.splitlines()}  # a hook is given the files
    assert hooks == checks
