"""Memory that the system refuses: the retries, and the message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, resource, sys

import torch
import torch._dynamo  # as the first mode that sees operations does
from oracle import ModuleHost, Net, make_lora

from iteris_core import Concept, IterisError, merge_loras

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
rows = [torch.randn(12, 480, 12, generator=generator, dtype=torch.float64) for _ in range(2)]
host = ModuleHost(Net(), rows)
weights = [weight.clone() for weight in host.model.parameters()]
concepts = [Concept(make_lora(seed), prompts=["unused"]) for seed in (1, 2)]


def merge(host):
    settings = {"precision": "float64"}
    return merge_loras(host, concepts, settings=settings, memory_budget=None)


def taken():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))


merge(ModuleHost(host.model, [some[:1] for some in rows]))  # libraries load what they need
for mib in (40, 8):
    host.copies_seen.clear()
    resource.setrlimit(resource.RLIMIT_DATA, (taken() + (mib << 20), -1))
    said = ""
    try:
        merge(host)
    except IterisError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
    same = all(map(torch.equal, weights, host.model.parameters()))
    hooks = sum(len(module._forward_hooks) for module in host.model.modules())
    forwards = len(host.copies_seen)
    print(json.dumps({"said": said, "same": same, "hooks": hooks, "forwards": forwards}))
"""
"""A forward of all 24 rows takes 90 MiB, and one of two rows, beside the others that wait, 20."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory")


@pytest.mark.slow
def test_with_less_memory_fewer_rows_run_at_once_and_what_was_tried_is_said():
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Else glibc keeps what is freed in heaps, in pieces that no later tensor fits into.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found, less = map(json.loads, done.stdout.splitlines())
    assert found["said"] == ""
    assert found["forwards"] > 2
    assert found["same"]
    said = less["said"]
    assert said.startswith("Out of memory in the model (")
    assert "()" not in said
    tried = said.partition("Tried: ")[2].partition(". Lower")[0].split("; ")
    assert tried[0] == "32 rows at once, waiting on the device"
    assert [way.partition(",")[0] for way in tried[-4:]] == [
        *("12 rows at once", "6 rows at once", "3 rows at once", "one row at once")
    ]
    assert "Lower samples or timesteps (fewer rows), or latent_size (smaller ones), or free" in said
    assert less["same"]
    assert less["hooks"] == 0
