"""One merge over two processes is the merge of one; a process that dies ends it without a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import rivals  # noqa: F401 (registers them)
import torch
from tiny import make_pipeline, random_lora, two_concepts

from iteris_core import Calibration, Runtime, merge_loras, write_lora
from iteris_core.activations.processes import ALONE, Processes
from iteris_core.errors import IterisError
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.solve.choose import POLICY, Policy

CALIBRATION = Calibration(samples=5, timesteps=2, denoising_steps=4)
METHODS = {
    "iteris": {"micro_batch": 3, "precision": "float64"},
    "iteris, directions": {"micro_batch": 2, "precision": "float64", "ridge": 1e-3},
    "iteris, jacobi": {"schedule": "jacobi", "iterations": 3, "precision": "float64"},
    "iteris, row tokens": {"row_tokens": 7, "precision": "float64"},
    "regmean++": {},
    "regmean": {},
    "ssr": {},
    "chain-of-merges": {"ridge": 1e-3},
    "gradient-fusion": {"steps": 5, "text_steps": 5},
    "loraclr": {"rate": 1e-2},
    "iteris-subspace": {},
    "custom-diffusion": {},
    "iteris, a concept each": {"precision": "float64", "ridge": 1e-3},
}
FEW = replace(CALIBRATION, samples=1, timesteps=1, latents="noise", empty_share=0.0)


class FewDirections(Policy):
    def directions(self, out, width, rank):
        return min(out, rank + 4)


def merge_all(processes: Processes = ALONE) -> dict[str, dict[str, torch.Tensor]]:
    pipeline = make_pipeline()
    pipeline.unet.double()
    pipeline.text_encoder.double()
    host = DiffusersHost(pipeline)
    concepts = two_concepts(host)
    found = {}
    for name, settings in METHODS.items():
        result = merge_loras(
            host,
            concepts,
            name.partition(",")[0],
            settings=settings,
            calibration=FEW if name.endswith("a concept each") else CALIBRATION,
            runtime=Runtime(processes, FewDirections() if name.endswith("directions") else POLICY),
        )
        found[name] = {site: c.dense() for site, c in result.lora.sites.items()}
    return found


def merge_in_process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size
    )
    torch.save(merge_all(Processes(rank, size)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_merge_as_one(tmp_path):
    torch.multiprocessing.spawn(merge_in_process, (2, str(tmp_path)), nprocs=2)
    alone = merge_all()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, sites in alone.items():
            assert sites.keys() == found[name].keys()
            for site, change in sites.items():
                gap = (found[name][site] - change).norm() / change.norm()
                # Moments in float32 round differently in two sums than in one.
                limit = 1e-5 if "precision" in METHODS[name] else 1e-3
                assert gap < limit, (name, rank, site, float(gap))


def test_every_process_needs_a_row():
    assert list(Processes(1, 3).mine(7)) == [1, 4]
    assert list(Processes(1, 3).others(7)) == [0, 2, 3, 5, 6]
    with pytest.raises(IterisError, match="2 rows cannot be shared by 3 processes"):
        Processes(0, 3).mine(2)


@pytest.fixture
def command(tmp_path):
    """A merge in two processes that writes ``merged.safetensors``. On CPUs ``accelerate launch``
    starts several processes only by MPI; torchrun makes the same environment."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    host = DiffusersHost(pipeline)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2"]
    command += ["-m", "iteris_core", "merge", str(tmp_path / "base"), "--device", "cpu"]
    command += ["-o", str(tmp_path / "merged.safetensors"), "--dtype", "float32"]
    for seed in (1, 2):
        file = write_lora(random_lora(host, seed), tmp_path / f"lora{seed}.safetensors")
        command += ["--concept", f"{file}:sks{seed}:cat"]
    return command


@pytest.mark.slow
def test_two_launched_processes_write_the_file_once(command, tmp_path):
    done = subprocess.run(
        [*command, "--samples", "6"], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1
    assert (tmp_path / "merged.safetensors").stat().st_size > 0


@pytest.mark.slow
def test_a_process_that_dies_ends_the_merge_without_a_file(command, tmp_path):
    running = subprocess.Popen(
        [*command, "--samples", "2000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    child = _child(running.pid, at_least=2)
    os.kill(child, signal.SIGKILL)
    assert running.wait(timeout=120) != 0
    assert not (tmp_path / "merged.safetensors").exists()
    assert not list(tmp_path.glob("*.tmp"))


def _child(parent: int, at_least: int) -> int:
    """The last of the working processes that ``parent`` started, once it computes."""
    for _ in range(1800):
        workers = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                with open(f"/proc/{entry}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent and int(fields[11]) > 400:  # 4 s of computing
                workers.append(int(entry))
        if len(workers) >= at_least:
            return max(workers)
        time.sleep(0.1)
    pytest.fail("the processes did not start")
