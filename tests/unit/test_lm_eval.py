"""Results of lm-evaluation-harness in a run directory are columns of its row."""

import json

import pandas as pd
import pytest
from test_runs import run

from dpo import results
from dpo.results.frames import DamagedRun
from dpo.sweep.directory import damage, lm_eval, status

# As version 0.4.13 writes it, with fewer of the keys beside `results`: a task with two metrics, one with filters of its
# answers, a group, of which the parts stand beside it, and one with measures that have no standard error.
RESULTS = {
    "results": {
        "arc_easy": {
            **{"name": "arc_easy", "alias": "arc_easy", "sample_len": 2376},
            **{"acc,none": 0.75, "acc_stderr,none": 0.009, "acc_norm,none": 0.7, "acc_norm_stderr,none": 0.01},
        },
        "gsm8k": {
            **{"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.02},
            **{"exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": 0.03},
        },
        "mmlu": {"acc,none": 0.4, "acc_stderr,none": 0.004, "alias": "mmlu"},
        "mmlu_anatomy": {"alias": " - anatomy", "acc,none": 0.375, "acc_stderr,none": 0.0625},
        "wikitext": {
            **{"alias": "wikitext", "word_perplexity,none": 20.5, "word_perplexity_stderr,none": "N/A"},
            **{"byte_perplexity,none": float("inf"), "byte_perplexity_stderr,none": "N/A"},
        },
    },
    "groups": {"mmlu": {"acc,none": 0.4, "acc_stderr,none": 0.004, "alias": "mmlu"}},
    "group_subtasks": {"mmlu": ["mmlu_anatomy"]},
    "versions": {"arc_easy": 1.0},
    "n-shot": {"arc_easy": 0},
    "date": 1795807966.0,
    "lm_eval_version": "0.4.13",
    "model_name": "policy",
}
COLUMNS = {
    **{"lm_eval/arc_easy/acc": 0.75, "lm_eval/arc_easy/acc/se": 0.009},
    **{"lm_eval/arc_easy/acc_norm": 0.7, "lm_eval/arc_easy/acc_norm/se": 0.01},
    **{"lm_eval/gsm8k/exact_match,strict-match": 0.25, "lm_eval/gsm8k/exact_match,strict-match/se": 0.02},
    **{"lm_eval/gsm8k/exact_match,flexible-extract": 0.5, "lm_eval/gsm8k/exact_match,flexible-extract/se": 0.03},
    **{"lm_eval/mmlu/acc": 0.4, "lm_eval/mmlu/acc/se": 0.004},
    **{"lm_eval/mmlu_anatomy/acc": 0.375, "lm_eval/mmlu_anatomy/acc/se": 0.0625},
    "lm_eval/wikitext/word_perplexity": 20.5,
}


def put(directory, content, name="results_2026-11-27T19-33-45.596120.json"):
    file = directory / "lm_eval" / "policy" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_what_a_file_holds(tmp_path):
    assert lm_eval(tmp_path) == {}
    put(tmp_path, RESULTS)
    (tmp_path / "lm_eval" / "policy" / "samples_arc_easy_2026-11-27T19-33-45.596120.jsonl").write_text("no results")
    assert lm_eval(tmp_path) == COLUMNS


def test_of_a_task_the_newest_file_counts(tmp_path):
    """Wherever it lies, and of that task alone: what it does not measure any more is gone."""
    other = tmp_path / "lm_eval" / "a" / "results_2026-11-28T08-00-00.000000.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({"results": {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.1}}}))
    put(tmp_path, RESULTS)
    kept = {key: value for key, value in COLUMNS.items() if "arc_easy" not in key}
    assert lm_eval(tmp_path) == {**kept, "lm_eval/arc_easy/acc": 0.5, "lm_eval/arc_easy/acc/se": 0.1}


def test_frames_have_them_beside_beta(tmp_path):
    """In the rows of the finished runs; a run without has none."""
    for beta, accuracy in ((0.1, 0.75), (0.02, 0.5)):
        put(run(tmp_path, beta), {"results": {"arc_easy": {"acc,none": accuracy, "acc_stderr,none": 0.01}}})
    run(tmp_path, 1.0)
    put(run(tmp_path, 2.0, finished=False), RESULTS)
    column = ["beta", "lm_eval/arc_easy/acc", "lm_eval/arc_easy/acc/se"]
    final = results.final(tmp_path)
    assert final[column].values.tolist()[:2] == [[0.02, 0.5, 0.01], [0.1, 0.75, 0.01]]
    assert final[column[1]].isna().tolist() == [False, False, True]
    frame = results.load(tmp_path)
    measured = frame[frame[column[1]].notna()]
    assert measured["split"].tolist() == ["test", "test"]
    assert measured[column].values.tolist() == [[0.02, 0.5, 0.01], [0.1, 0.75, 0.01]]
    results.report(tmp_path)
    assert pd.read_csv(tmp_path / "table.csv")[column[1]].tolist()[:2] == [0.5, 0.75]


@pytest.mark.parametrize("text", ["", '{"results": {"arc', "[1]", "{}", '{"results": [1]}', '{"results": {"a": 1}}'])
def test_a_damaged_file_is_named(tmp_path, text):
    directory = run(tmp_path, 0.1)
    assert damage(directory) is None
    file = put(directory, text)
    wrong = damage(directory)
    assert wrong.startswith(f"{file} must hold the results of lm-evaluation-harness, found ")
    assert wrong.endswith("; delete it, and run lm_eval again")
    assert status(directory) == "damaged"
    with pytest.warns(DamagedRun, match="results_2026"):
        assert results.final(tmp_path).empty
    file.unlink()
    assert status(directory) == "finished"
