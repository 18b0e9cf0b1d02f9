"""Put the policy of a finished run on the Hugging Face hub: python -m dpo.push run=runs/... repo=user/name"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from dpo.results.card import CARD
from dpo.sweep import command_line
from dpo.sweep.directory import reason, status


@dataclass
class Push:
    """`python -m dpo.push`."""

    run: str
    repo: str
    private: bool
    dry_run: bool


def main() -> None:
    def command(config: DictConfig) -> None:
        try:
            print(push(Path(config.run), config.repo, config.private, config.dry_run))
        except MissingMandatoryValue:
            sys.exit("run and repo must be given; add run=runs/<name>/<run> repo=user/name")
        except (ValueError, OSError) as error:
            sys.exit(str(error))

    if {"-m", "--multirun"} & {*sys.argv[1:]}:
        sys.exit("dpo.push takes one run, got -m; call it once for each")
    ConfigStore.instance().store(name="push_schema", node=Push)
    command_line.run("push", command)


def push(run: Path, repo: str, private: bool, dry_run: bool) -> str:
    """Upload `policy/` of a run; what to tell the user.

    Raises: ValueError if the run is not finished, or before anything is sent if it cannot go there as asked; OSError
    with what the hub says.
    """
    policy = run / "policy"
    check(run, repo)
    files = sorted(file for file in policy.rglob("*") if file.is_file())
    if dry_run:
        sizes = [f"  {file.relative_to(policy)}  {file.stat().st_size:,} bytes" for file in files]
        where = f"{'private' if private else 'public'} repository {repo}"
        return "\n".join([f"would go to the {where}:", *sizes, "", (policy / CARD).read_text()])
    if huggingface_hub.get_token() is None:
        raise ValueError("the hub wants a token, found none; set HF_TOKEN, or run `hf auth login`")
    if constants.HF_HUB_OFFLINE:
        raise ValueError("the hub must be asked, found HF_HUB_OFFLINE, which forbids it; unset it")
    api = HfApi()
    try:
        _make(api, repo, private)
        api.upload_folder(repo_id=repo, folder_path=policy, commit_message="The policy of a run, and its model card")
    except ValueError:
        raise
    except Exception as error:  # what the hub says, or the network
        raise OSError(f"the hub did not take {repo}: {str(error).strip()}") from error
    return f"{len(files)} files are at {api.endpoint}/{repo}"


def check(run: Path, repo: str) -> None:
    """Raise a ValueError if there is nothing that can go, or nowhere."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"repo must be user/name, got {repo}")
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"run must be the directory of a run, such as runs/dev/beta=0.1, found no config.yaml in {run}"
        )
    if (state := status(run)) != "finished":
        raise ValueError(f"run must be finished, found {run} {state}{f': {why}' if (why := reason(run)) else ''}")
    if not (run / "policy").is_dir():
        raise ValueError(f"run must have trained a policy, found no {run / 'policy'}; take one of dpo.train or dpo.sft")
    if not (run / "policy" / CARD).is_file():
        raise ValueError(
            f"the policy must have a model card, found no {run / 'policy' / CARD}: runs of dpo.train and dpo.sft "
            "write one since there are cards; write it by hand"
        )


def _make(api: HfApi, repo: str, private: bool) -> None:
    """Raises: ValueError if the repository is there and not as private as was asked."""
    try:
        public = not api.repo_info(repo).private
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private)
        return
    if public and private:
        raise ValueError(
            f"{repo} must be private, found a public repository; private=false sends it there all the same"
        )


if __name__ == "__main__":
    main()
