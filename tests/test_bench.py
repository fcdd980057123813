"""Every bench runs, small and without its peers, so that it cannot rot; its figures mean nothing here."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "bench"))

import decoding
import indexing
import loading
import peer
import reading
import run
import transfer

BENCHES = {module.__name__: module for module in (decoding, indexing, loading, reading, transfer)}


@pytest.mark.parametrize("name", BENCHES)
def test_bench_gives_figures_that_the_page_can_show(name):
    figures = BENCHES[name].main(quick=True, peers=False)
    section = run._section(name, BENCHES[name].__doc__ or "", figures)
    assert "| figure | value |" in section or "|---|---|" in section
    assert "does not run" not in section and "nan" not in section
    wrong = [value for key, value in figures.items() if key.startswith("frames that are not the wanted ones")]
    assert all(value.startswith("0 of ") for value in wrong) and (wrong or name != "decoding")


def test_every_bench_has_its_place_on_the_page():
    page = run.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in page and f"<!-- end of {name} -->" in page for name in run.BENCHES)
    assert set(BENCHES) <= set(run.BENCHES)


def test_peer_that_cannot_be_installed_is_reported_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "nobody.txt").write_text("./a-package-that-is-not-here\n")
    monkeypatch.setattr(peer, "HERE", tmp_path)
    monkeypatch.setattr(peer, "CACHE", tmp_path)
    with peer.started(("nobody", "decoders")) as (running, failures):
        assert not running and "cannot be installed" in failures["nobody"]


def test_peer_that_fails_is_reported_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("def fails():\n    raise ValueError('no frames')\n")
    (tmp_path / "serve.py").write_text((peer.HERE / "serve.py").read_text())
    monkeypatch.setattr(peer, "HERE", tmp_path)
    monkeypatch.setattr(peer, "CACHE", tmp_path)
    monkeypatch.setattr(peer, "_environment", lambda name: Path(sys.executable))
    with peer.started(("one", "broken"), ("other", "missing")) as (running, failures):
        assert "No module named 'missing'" in failures["other"]
        with pytest.raises(peer.PeerError, match="ValueError: no frames"):
            running["one"].call("fails")
