"""Models of a hub: one of our own, on this machine."""

import os
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from command_lines import invoke
from processes import run_apart

from qvtrace.archive import Archive


class Hub(SimpleHTTPRequestHandler):
    """Serves `NAME/resolve/REVISION/FILE` from a folder, and nothing else."""

    def send_head(self):
        name, resolve, _, file = (self.path.split("?")[0].strip("/").split("/", 3) + [""] * 4)[:4]
        self.path = f"/{name}/{file}" if resolve == "resolve" else "/nothing"
        return super().send_head()

    def end_headers(self):
        name = self.path.replace("/", "-")  # contents of one tag are one file in the cache
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    # Not with this module, which is imported where the hub's address is yet to be set.
    from tiny_models import build

    folder = tmp_path_factory.mktemp("hub")
    model, _ = build("llama")
    model.save_pretrained(folder / "tiny")
    return folder


def record(endpoint: str, folder: Path, name: str) -> None:
    """In a process of its own, since the hub's address is read when its library is imported."""
    os.environ |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder)}
    time.sleep = refuse_to_wait
    result = invoke("record", "-m", name, "-o", folder / "fp.st")
    (folder / "said").write_text(result.stderr)
    raise SystemExit(result.exit_code)


def refuse_to_wait(seconds: float) -> None:
    raise AssertionError(f"waits {seconds} seconds before it tries again")


def test_a_model_comes_from_the_hub_and_from_its_cache_when_that_is_out_of_reach(models, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=models)) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_port}"

        assert run_apart(record, address, tmp_path, "tiny") == 0, (tmp_path / "said").read_text()

        hub.shutdown()
    (tmp_path / "fp.st").rename(tmp_path / "first.st")
    (tmp_path / "fp.manifest.json").unlink()

    assert run_apart(record, address, tmp_path, "tiny") == 0, (tmp_path / "said").read_text()

    with Archive.open(tmp_path / "fp.st") as again, Archive.open(tmp_path / "first.st") as first:
        assert again.manifest.tensors == first.manifest.tensors


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as closed:
        address = f"http://127.0.0.1:{closed.server_port}"

    assert run_apart(record, address, tmp_path, "tiny") == 2

    assert (tmp_path / "said").read_text().splitlines() == [
        "qvtrace: --model tiny: is no local directory, and not all of it is in the cache of the "
        f"Hugging Face hub ({address}), which cannot be reached; check the name and the connection"
    ]
