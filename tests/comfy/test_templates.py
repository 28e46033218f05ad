"""The graphs as ComfyUI hands them out: from a clone of the last commit, and from the package that
the registry makes of it."""

import json
import shutil
import subprocess

import pytest
from conftest import ROOT, running
from test_front_end import needs_a_browser, run

PACK = "iteris-lora"


def git(*arguments, cwd=ROOT):
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout of git")
    return done.stdout


@pytest.fixture(scope="module", params=["clone", "package"])
def served(request, tmp_path_factory, library):
    """A server with nothing but the pack, and the files of its graphs."""
    base = tmp_path_factory.mktemp(request.param)
    pack = base / "custom_nodes" / PACK
    pack.parent.mkdir()
    git("clone", "--quiet", "--shared", str(ROOT), str(pack))
    if request.param == "package":
        for name in git("ls-files", "-ci", "-z", "--exclude-from=.comfyignore", cwd=pack).split(
            "\0"
        ):
            if name:
                (pack / name).unlink()
        for folder in sorted((p for p in pack.rglob("*") if p.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
        shutil.rmtree(pack / ".git")
    with running(base) as client:
        yield client, sorted((pack / "workflows").glob("*.json"))


def test_every_graph_is_there_by_its_address(served):
    client, graphs = served
    assert len(graphs) == 18
    assert sorted(client.get("/api/workflow_templates")[PACK]) == [path.stem for path in graphs]
    for path in graphs:
        address = f"/api/workflow_templates/{PACK}/{path.stem}"
        assert client.get(f"{address}.json") == json.loads(path.read_text(encoding="utf-8"))
        assert client.get(f"{address}.jpg") == path.with_suffix(".jpg").read_bytes()


@pytest.mark.slow
@needs_a_browser
def test_every_graph_opens_by_a_click(served):
    client, graphs = served
    seen = run("templates.js", client, *(path.stem for path in graphs))
    assert (seen["failed"], seen["toasts"], seen["errors"]) == ([], [], [])
    for path in graphs:
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        assert seen["opened"][path.stem] == sorted(node["type"] for node in nodes), path.stem
