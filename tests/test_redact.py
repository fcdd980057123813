"""Twenty secrets in the config, the command line, URLs and the environment; none is in anything that a run writes."""

import json
import os
import sys

import pytest
from forked_ranks import attempt, toy
from omegaconf import OmegaConf

from vlp.training import redact, trackers

SECRETS = {
    "url_user": "https://Zq1canary:x@host/a.tar",
    "url_password": "https://user:Zq2canary@host/a.tar",
    "s3_signature": "https://b.s3.amazonaws.com/a.tar?X-Amz-Signature=Zq3canary&X-Amz-Expires=60",
    "s3_credential": "https://b.s3.amazonaws.com/a.tar?X-Amz-Credential=Zq4canary%2F2026",
    "azure_sas": "https://a.blob.core.windows.net/c?sv=1&sig=Zq5canary",
    "gcs_signature": "https://storage.googleapis.com/b/o?GoogleAccessId=a&Signature=Zq6canary",
    "query_token": "http://host/v?token=Zq7canary",
    "password": "Zq8canary",
    "api_key": "Zq9canary",
    "secret": "Zq10canary",
    "access_token": "Zq11canary",
    "aws_secret_access_key": "Zq12canary",
    "private-key": "Zq13canary",
    "auth": "Zq14canary",
    "header": "Authorization: Bearer Zq15canary",
    "assigned": "hello password=Zq16canary and more",
    "hub": "hf_Zq17canaryZq17canary",
    "jwt": "eyJhbGciOiJI.eyJZq18canary.sigsig",
    "pem": "-----BEGIN PRIVATE KEY-----\nZq19canary\n-----END PRIVATE KEY-----",
    "from_environment": "Zq20canary-of-the-environment",
}


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "Zq20canary-of-the-environment")


@pytest.mark.parametrize("name", SECRETS)
def test_each_kind_of_secret_is_hidden_in_a_tree_and_in_an_assignment(environment, name):
    assert "canary" not in json.dumps(redact.tree({"a": [{name: SECRETS[name]}]}))
    assert "canary" not in redact.text(f"train.py logger.x.{name}={SECRETS[name]}")


@pytest.mark.parametrize(
    "value", ["tokenizer.name=bert", "num_tokens: 5", "https://host/path/a.tar", "s3://bucket/shards/{0..9}.tar"]
)
def test_what_is_no_secret_stays(value):
    tree = {"clip": {"size": 3, "names": ["a", None, True, value]}}
    assert redact.text(value) == value and redact.tree(tree) == tree


class Carrier:
    """A schedule of the user's own whose arguments hold secrets."""

    def __init__(self, *, extra: dict) -> None:
        self.extra = extra

    def __call__(self, step: int, max_steps: int) -> float:
        """Return the factor of the learning rate."""
        return 1.0


def leak(rank: int) -> None:
    """Fail with a secret in the message, in the middle of training, with W&B writing offline."""
    from vlp.training import module

    os.environ |= {"SOME_API_KEY": SECRETS["from_environment"], "VLP_ALLOW": "test_redact"}
    sys.argv = ["train.py", *(f"schedule.extra.{name}={value}" for name, value in SECRETS.items())]
    note = module.Pretraining.note

    def bad(self, *arguments):
        note(self, *arguments)
        if self.cursor == 2:
            raise RuntimeError(f"cannot read {SECRETS['url_password']} with {SECRETS['from_environment']}")

    module.Pretraining.note = bad


@pytest.mark.slow
def test_no_file_of_a_failed_run_holds_a_secret_of_its_config(place):
    cfg = toy(place, "secrets", "trainer.max_steps=3", "logger=[wandb]", "logger.wandb.offline=true")
    OmegaConf.set_struct(cfg, False)
    cfg.schedule = {"_target_": "test_redact.Carrier", "extra": SECRETS}
    cfg.data.videos = SECRETS["s3_signature"]
    cfg.data.captions = SECRETS["url_password"]
    done = attempt(cfg, log=place / "secrets.log", before=leak, report=True)
    assert done.codes == [70]
    run = place / "runs" / "secrets"
    files = [path for path in [*run.rglob("*"), place / "secrets.log"] if path.is_file()]
    assert {"run.json", "config.yaml", "report.html", "state.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert {str(path.relative_to(place)) for path in files if b"canary" in path.read_bytes()} == set()


def test_only_listed_sections_reach_a_tracker():
    cfg = {"run": {"name": "a", "seed": 1, "x": 2}, "optim": {"lr": 0.1, "secret": "s"}, "paths": {"runs": "/home/me"}}
    cfg["data"] = {key: 1 for key in ("batch_size", "num_lanes", "window_shards", "bucket_steps", "videos")}
    facts = trackers.public_facts(cfg)
    assert facts["run.seed"] == 1 and facts["optim.lr"] == 0.1 and facts["optim.secret"] == redact.HIDDEN
    assert not {"run.x", "paths.runs", "data.videos"} & facts.keys()
