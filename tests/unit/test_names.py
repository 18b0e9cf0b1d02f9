"""A model's name is asked for on the hub when a sweep is planned: what a stand-in answers, and what is made of it."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from dpo.policy import model as models

HUB = {  # what a name stands for on the hub -> its answer
    "there": (200, ""),
    "misspelt": (401, "RepoNotFound"),
    "closed": (403, "GatedRepo"),
    "older@v2": (404, "RevisionNotFound"),
    "data": (404, "EntryNotFound"),
    "broken": (503, ""),
}
SAID = {
    "misspelt": "Repository Not Found",
    "closed": "Cannot access gated repo",
    "older@v2": "Revision Not Found",
    "data": "Entry Not Found",
}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        _, _, name, _, revision, _ = self.path.split("/")
        status, code = HUB[name if revision == "main" else f"{name}@{revision}"]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    def do_GET(self):  # what the library wants to know beside
        self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        template = f"http://127.0.0.1:{server.server_port}" + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", HUB)
def test_the_hub_is_asked_what_a_name_stands_for(hub, capsys, name):
    if name in SAID:
        with pytest.raises(ValueError, match=f"me/{name} must be .* the hub did not give it: {SAID[name]}"):
            models.ask_hub(f"me/{name}")
    else:
        models.ask_hub(f"me/{name}")
    assert ("its run asks again" in capsys.readouterr().out) == (name == "broken")


def test_a_hub_that_cannot_be_asked_is_left_to_the_run(hub, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    models.ask_hub("me/misspelt")
    assert not capsys.readouterr().out
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/a/file")
    models.ask_hub("me/misspelt")  # which the run has from there
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    template = "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"  # where nobody listens
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    said = "the hub could not be asked for me/misspelt, its run asks again: "
    models.ask_hub("me/misspelt")
    assert said in capsys.readouterr().out

    def wordless(url):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", wordless)
    models.ask_hub("me/misspelt")
    assert f"{said}TimeoutError" in capsys.readouterr().out
