"""Every module of the package can be imported, and with it all that it names of the others."""

import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil
import megatron_rl, megatron_rl.device
from megatron_rl.rollout.isolation import isolated

with isolated():  # as a rank imports vLLM
    for module in pkgutil.walk_packages(megatron_rl.__path__, "megatron_rl."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


def test_every_module_can_be_imported() -> None:
    ended = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
