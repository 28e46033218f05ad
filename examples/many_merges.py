"""Every pair of a library of LoRAs, or every setting of a sweep, as a Ray job with one table.

    python examples/many_merges.py BASE out/ cat.safetensors:sks:cat dog.safetensors:zwx:dog …
        [--size 2] [--method iteris] [--set ridge=1e-4 --set ridge=1e-5]

Needs ``ray``. Each merge is a task with three tries; what is written already is not merged again,
so a job that was stopped goes on where it was. ``out/table.csv`` has a line per merge.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from pathlib import Path
from typing import Any


def merge_one(job: dict[str, Any]) -> dict[str, Any]:
    """One merge in a worker; the report is written beside the file, last."""
    from iteris_core import merge_loras
    from iteris_core.cli.base import load_base
    from iteris_core.cli.merge_file import parse_concept
    from iteris_core.hosts.diffusers import DiffusersHost

    host = DiffusersHost(load_base(job["base"], None))
    options = [parse_concept(text) for text in job["concepts"]]
    concepts = [option.read(host) for option in options]
    result = merge_loras(
        host,
        concepts,
        job["method"],
        settings=job["settings"],
        calibration=job["calibration"],
    )
    file = Path(job["file"])
    result.save(file, overwrite=True)
    row = {
        "file": file.name,
        "concepts": " + ".join(result.report.concepts),
        "method": job["method"],
        "settings": json.dumps(job["settings"]),
        "seconds": round(result.report.seconds, 2),
        "output error": round(
            sum(after for _, after in result.report.residuals()) / len(concepts), 4
        ),
    }
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(row))
    temporary.replace(file.with_suffix(".json"))
    return row


def jobs_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One job per combination of LoRAs and setting."""
    variants: list[dict[str, Any]] = [{}]
    if arguments.set:
        pairs = [text.partition("=") for text in arguments.set]
        variants = [{name: json.loads(value)} for name, _, value in pairs]
    jobs: list[dict[str, Any]] = []
    for combination in itertools.combinations(arguments.concept, arguments.size):
        stems = [Path(text.partition(".safetensors")[0]).name for text in combination]
        for settings in variants:
            ending = "".join(f"-{name}={value}" for name, value in settings.items())
            name = "+".join(stems) + f"-{arguments.method}{ending}"
            jobs.append(
                {
                    "base": arguments.base,
                    "concepts": list(combination),
                    "method": arguments.method,
                    "settings": settings,
                    "calibration": json.loads(arguments.calibration),
                    "file": str((arguments.output / f"{name}.safetensors").resolve()),
                }
            )
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("output", type=Path)
    parser.add_argument("concept", nargs="+", help="FILE:TRIGGER:CLASS[:STRENGTH]")
    parser.add_argument("--size", type=int, default=2, help="LoRAs per merge")
    parser.add_argument("--method", default="iteris")
    parser.add_argument("--set", action="append", help="NAME=VALUE; each is a merge of its own")
    parser.add_argument("--calibration", default="{}", help='JSON, such as {"samples": 25}')
    parser.add_argument("--gpus", type=float, default=0, help="Of a card, per merge")
    parser.add_argument("--cpus", type=float, default=1, help="Per merge")
    arguments = parser.parse_args()
    import ray

    arguments.output.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(arguments)
    left = [job for job in jobs if not Path(job["file"]).with_suffix(".json").exists()]
    print(f"{len(jobs)} merges, {len(jobs) - len(left)} there already")
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    task = ray.remote(
        num_cpus=arguments.cpus, num_gpus=arguments.gpus, max_retries=3, retry_exceptions=True
    )(merge_one)
    waiting = {task.remote(job): job for job in left}
    failed: list[str] = []
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        job = waiting.pop(done)
        try:
            print(ray.get(done)["file"], flush=True)
        except ray.exceptions.RayError as error:
            failed.append(f"{job['file']}: {error}")
    ray.shutdown()
    rows = [
        json.loads(file.read_text())
        for job in jobs
        if (file := Path(job["file"]).with_suffix(".json")).exists()
    ]
    if rows:
        with (arguments.output / "table.csv").open("w", newline="") as table:
            writer = csv.DictWriter(table, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if failed:
        raise SystemExit("Failed after three tries:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
