"""Every pair of a library of LoRAs, or every setting of a sweep, as a Ray job with one table.

    python scripts/many_merges.py BASE out/ cat.safetensors:sks:cat dog.safetensors:zwx:dog …
        [--size 2] [--best 5] [--method iteris] [--set ridge=1e-4 --set ridge=1e-5]

Needs ``ray``. Each merge is a task with three tries; what is written already is not merged again,
so a job that was stopped goes on where it was. Workers share their samples in ``out/store``, so
that each LoRA's are made once. ``out/table.csv`` has a line per merge; *kept* is what its report
says of rows held out of it. ``--best 5`` also merges the five LoRAs whose pairs keep the most.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from pathlib import Path
from statistics import fmean
from typing import Any

HOSTS: dict[str, Any] = {}
"""The base, loaded once in each worker."""


def merge_one(job: dict[str, Any]) -> dict[str, Any]:
    """One merge in a worker; the file gets its name last, after its line of the table."""
    from iteris_core import SampleStore, merge_loras
    from iteris_core.cli.base import load_base
    from iteris_core.cli.merge_file import parse_concept
    from iteris_core.hosts.diffusers import DiffusersHost

    if job["base"] not in HOSTS:
        HOSTS[job["base"]] = DiffusersHost(load_base(job["base"], None))
    host = HOSTS[job["base"]]
    concepts = [parse_concept(text) for text in job["concepts"]]
    result = merge_loras(
        host,
        concepts,
        job["method"],
        settings=job["settings"],
        calibration=job["calibration"],
        store=SampleStore(Path(job["store"])) if job["store"] else None,
    )
    file, kept = Path(job["file"]), result.report.kept.get("1")
    unfinished = file.with_name(f"{file.stem}.part.safetensors")
    result.save(unfinished, overwrite=True)
    row = {
        "file": file.name,
        "concepts": " + ".join(result.report.concepts),
        "method": job["method"],
        "settings": json.dumps(job["settings"]),
        "seconds": round(result.report.seconds, 2),
        "output error": round(
            sum(after for _, after in result.report.residuals()) / len(concepts), 4
        ),
        "kept": round(fmean(kept), 4) if kept else None,
    }
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(row))
    temporary.replace(file.with_suffix(".json"))
    unfinished.rename(file)
    return row


def jobs_of(arguments: argparse.Namespace, combinations: Any) -> list[dict[str, Any]]:
    """One job per combination of LoRAs and setting."""
    variants: list[dict[str, Any]] = [{}]
    if arguments.set:
        pairs = [text.partition("=") for text in arguments.set]
        variants = [{name: json.loads(value)} for name, _, value in pairs]
    jobs: list[dict[str, Any]] = []
    store = "" if arguments.no_store else str((arguments.output / "store").resolve())
    for combination in combinations:
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
                    "store": store,
                    "file": str((arguments.output / f"{name}.safetensors").resolve()),
                }
            )
    return jobs


def best_of(concepts: list[str], jobs: list[dict[str, Any]], count: int) -> list[str]:
    """The pair that keeps the most, and one by one the LoRA whose pairs with those chosen do."""
    kept = {frozenset(job["concepts"]): read(job)["kept"] for job in jobs}
    if None in kept.values():
        raise SystemExit("--best goes by held-out rows, which some pairs do not have.")
    chosen = list(max(kept, key=lambda pair: kept[pair]))
    while len(chosen) < count:
        left = [one for one in concepts if one not in chosen]
        chosen.append(max(left, key=lambda one: fmean(kept[frozenset((one, c))] for c in chosen)))
    return [one for one in concepts if one in chosen]


def read(job: dict[str, Any]) -> dict[str, Any]:
    return json.loads(written(job).read_text())


def written(job: dict[str, Any]) -> Path:
    return Path(job["file"]).with_suffix(".json")


def run(jobs: list[dict[str, Any]], resources: dict[str, float]) -> list[str]:
    """Merge what is not there yet; what failed three times."""
    import ray

    left = [job for job in jobs if not Path(job["file"]).exists()]
    if foreign := [j["file"] for j in jobs if j not in left and not written(j).exists()]:
        raise SystemExit(f"{foreign[0]} is not of this job: choose another folder for it.")
    print(f"{len(jobs)} merges, {len(jobs) - len(left)} there already", flush=True)
    task = ray.remote(**resources, max_retries=3, retry_exceptions=True)(merge_one)
    waiting, failed = {task.remote(job): job for job in left}, list[str]()
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        job = waiting.pop(done)
        try:
            print(ray.get(done)["file"], flush=True)
        except ray.exceptions.RayError as error:
            failed.append(f"{job['file']}: {error}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("output", type=Path)
    parser.add_argument("concept", nargs="+", help="FILE:TRIGGER:CLASS[:STRENGTH]")
    parser.add_argument("--size", type=int, default=2, help="LoRAs per merge")
    parser.add_argument("--best", type=int, help="also merge as many whose pairs keep the most")
    parser.add_argument("--method", default="iteris")
    parser.add_argument("--set", action="append", help="NAME=VALUE; each is a merge of its own")
    parser.add_argument("--calibration", default="{}", help='JSON, such as {"samples": 25}')
    parser.add_argument("--gpus", type=float, default=0, help="Of a card, per merge")
    parser.add_argument("--cpus", type=float, default=1, help="Per merge")
    parser.add_argument("--no-store", action="store_true", help="make all samples anew")
    arguments = parser.parse_args()
    if arguments.best and (arguments.size != 2 or arguments.set):
        parser.error("--best chooses by pairs: leave --size and --set out")
    if arguments.best and not 2 < arguments.best <= len(arguments.concept):
        parser.error(f"--best must be from 3 to {len(arguments.concept)}, the number of LoRAs")
    import ray

    arguments.output.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(arguments, itertools.combinations(arguments.concept, arguments.size))
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    resources = {"num_cpus": arguments.cpus, "num_gpus": arguments.gpus}
    failed = run(jobs, resources)
    if arguments.best and not failed:
        best = jobs_of(arguments, [best_of(arguments.concept, jobs, arguments.best)])
        failed, jobs = run(best, resources), [*jobs, *best]
    ray.shutdown()
    rows = [read(job) for job in jobs if Path(job["file"]).exists()]
    if rows:
        with (arguments.output / "table.csv").open("w", newline="") as table:
            writer = csv.DictWriter(table, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if failed:
        raise SystemExit("Failed after three tries:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
