"""The command as a user types it: what it writes, what it refuses, and what a killed run leaves behind."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_course.pipeline import empty_results, main

PROMPTS = [f"How do I {verb} the {thing}?" for verb in ("clean", "fix", "paint", "move") for thing in ("roof", "door", "boat", "lamp", "wall")]
VOLATILE = ("seconds", "samples_per_second", "peak_memory_mb")


def rows(n: int = 120) -> list[dict]:
    "Comparisons in which the better answer names the thing and the worse one does not."
    answers = ("First take the {} down. Then work slowly and check the result.", "Ask somebody else, I do not know. Really.")
    made = []
    for i in range(n):
        prompt = PROMPTS[i % len(PROMPTS)]
        thing = prompt.rstrip("?").split()[-1]
        good, bad = (answer.format(thing) + f" Note {i}." for answer in answers)
        made.append({"prompt": prompt, "response_a": good, "response_b": bad, "winner": "a"} if i % 3 else
                    {"prompt": prompt, "response_a": bad, "response_b": good, "winner": "b"})
    return made


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def command(*words: str, **options) -> subprocess.CompletedProcess:
    "The command in a process of its own, as a shell would start it."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-m", "rlhf_course", *map(str, words)], capture_output=True, text=True, timeout=600,
                          env=environment, **options)


def settled(results: dict) -> dict:
    "Results without what may differ between two runs of one seed."
    kept = {key: value for key, value in results.items() if key not in VOLATILE}
    return kept | {"rlhf": {key: value for key, value in kept["rlhf"].items() if key not in VOLATILE}}


def same_keys(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        if isinstance(value, dict) and value:
            assert list(found[key]) == list(value), key


@pytest.fixture(scope="module")
def arena_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("arena") / "run"
    done = command("run", "--fast", "--seed", "3", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "gemm_4bit_forward" not in done.stderr  # bitsandbytes offers a kernel to processors that could use it
    return out


@pytest.fixture(scope="module")
def file_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("file")
    bad = [{"prompt": "x?", "response_a": "", "response_b": "b", "winner": "a"}, {"prompt": "x?", "response_a": "s", "response_b": "s", "winner": "b"}]
    done = command("run", "--fast", "--data", write_jsonl(folder / "mine.jsonl", rows() + bad), "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_arena_run_writes_everything(arena_run):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    results = json.loads((arena_run / "results.json").read_text())
    same_keys(results, empty_results(3))
    nulls = [f"{part}.{key}" for part, values in results.items() if isinstance(values, dict) for key, value in values.items() if value is None]
    assert nulls == [] and results["seed"] == 3
    data, reward, rlhf = results["data"], results["reward_model"], results["rlhf"]
    assert data["n_read"] == data["n_kept"] + sum(data["dropped"].values()) and data["n_train"] + data["n_valid"] == data["n_kept"]
    assert reward["accuracy_ci95"][0] <= reward["accuracy"] <= reward["accuracy_ci95"][1]
    assert reward["accuracy"] > 0.55 and reward["bayes_accuracy"] > 0.8
    assert rlhf["utility_best"] == 6 and abs(rlhf["kl"]) > 0 and rlhf["steps"] > 0
    assert sum(results["seconds"][stage] for stage in ("data", "language_model", "reward_model", "rlhf", "report")) <= results["seconds"]["total"] + 1

    for name, loader in (("reward_model/merged", AutoModelForSequenceClassification), ("policy", AutoModelForCausalLM)):
        assert loader.from_pretrained(arena_run / name).config.pad_token_id == AutoTokenizer.from_pretrained(arena_run / name).pad_token_id
    assert (arena_run / "reward_model/adapter/adapter_model.safetensors").is_file()
    assert not [path.name for path in arena_run.rglob("*") if path.name.startswith(".") or path.suffix in (".bin", ".pt", ".pkl")]


def test_report_is_self_contained(arena_run, file_run):
    for run in (arena_run, file_run):
        page = (run / "report.html").read_text()
        outside = [word for word in ("http://", "https://", "<script", "<link", "@import", "url(") if word in page]
        assert outside == [] and page.count('src="data:image/png;base64,') == page.count("<img") >= 3
        assert "before" in page and "after" in page


def test_same_seed_gives_the_same_results(arena_run, tmp_path):
    done = command("run", "--fast", "--seed", "3", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert settled(again) == settled(json.loads((arena_run / "results.json").read_text()))


def test_run_on_a_file(file_run):
    results = json.loads((file_run / "results.json").read_text())
    same_keys(results, empty_results(0))
    assert results["data"]["source"] == "mine.jsonl" and results["data"]["n_read"] == 122
    assert results["data"]["dropped"] == {"empty response": 1, "identical responses": 1}
    reward, rlhf = results["reward_model"], results["rlhf"]
    assert 0 <= reward["accuracy"] <= 1 and abs(reward["always_b_accuracy"] - 0.5) < 0.4 # sides were shuffled
    assert reward["bayes_accuracy"] is None and rlhf["utility_after"] is None and results["language_model"]["entropy"] is None
    assert rlhf["reward_after"] is not None


def test_encoder_is_a_reward_model_but_not_a_policy(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({word for row in rows() for text in row.values() for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                            sep_token="[SEP]").save_pretrained(tmp_path / "bert")
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=64)).save_pretrained(tmp_path / "bert")
    done = command("run", "--fast", "--data", write_jsonl(tmp_path / "mine.jsonl", rows()), "--model", tmp_path / "bert", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["reward_model"]["accuracy"] is not None
    assert set(results["rlhf"].values()) == {None} and "PPO cannot tune it" in done.stderr
    assert not (tmp_path / "run" / "policy").exists()


def test_a_model_without_pad_token_or_chat_template(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from rlhf_course.tiny_lm import train_bpe_tokenizer

    tokenizer = train_bpe_tokenizer([text for row in rows() for text in row.values()], vocab_size=320)
    tokenizer.chat_template, tokenizer.pad_token = None, "<eos>"
    tokenizer.save_pretrained(tmp_path / "gpt")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=64, n_layer=1, n_head=2, eos_token_id=tokenizer.eos_token_id,
                               bos_token_id=None)).save_pretrained(tmp_path / "gpt")
    done = command("run", "--fast", "--data", write_jsonl(tmp_path / "mine.jsonl", rows()), "--model", tmp_path / "gpt", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "added '<|pad|>'" in done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rlhf"]["steps"] == 1


def refused(capsys, *words) -> str:
    "The one line with which the command refuses."
    try:
        code = main([str(word) for word in words])
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said, said
    return said


@pytest.mark.parametrize("name, content, words", [
    ("missing.jsonl", None, "no such file"),
    ("empty.jsonl", b"", "empty"),
    ("broken.jsonl", b'{"prompt": "x", "response_a"\n', "line 1"),
    ("bytes.jsonl", b'{"prompt": "\xff\xfe", "response_a": "a", "response_b": "b", "winner": "a"}\n', "utf-8"),
    ("cut.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 1000)[:40], "gzip"),
    ("cut.parquet", b"PAR1 and then nothing", "parquet"),
    ("columns.jsonl", b'{"question": "x", "answer": "y"}\n', "question"),
    ("nothing.jsonl", b'{"prompt": "x", "response_a": "s", "response_b": "s", "winner": "a"}\n', "nothing"),
    ("one_prompt.jsonl", b'{"prompt": "x", "response_a": "s", "response_b": "t", "winner": "a"}\n' * 3, "same prompt"),
])
def test_bad_data_is_refused(capsys, tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    said = refused(capsys, "run", "--data", path, "--out", tmp_path / "run")
    assert words.lower() in said.lower() and name in said and len(said.strip().splitlines()[-1:]) == 1
    assert said.strip().splitlines()[-1].startswith("rlhf-course: ")
    assert not (tmp_path / "run" / "results.json").exists()


def test_strict_refuses_a_drop(capsys, tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", rows(30) + [{"prompt": "x", "response_a": "a", "response_b": "b", "winner": "nobody"}])
    said = refused(capsys, "run", "--data", path, "--strict", "--out", tmp_path / "run")
    assert "31" in said and "nobody" in said


def test_bad_model_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = write_jsonl(tmp_path / "mine.jsonl", rows(30))
    (tmp_path / "folder").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"model_type": "no_such_type"}')
    for model in (tmp_path / "folder", tmp_path / "half", data, "nobody/no-such-model"):
        assert str(model) in refused(capsys, "run", "--data", data, "--model", model, "--out", tmp_path / "run")


def test_bad_output_is_refused(capsys, tmp_path, arena_run):
    data = write_jsonl(tmp_path / "mine.jsonl", rows(30))
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, "run", "--data", data, "--out", tmp_path / "file")
    assert "cannot be written" in refused(capsys, "run", "--data", data, "--out", "/proc/no/such")
    assert "already holds" in refused(capsys, "run", "--data", data, "--out", arena_run)


@pytest.mark.parametrize("words", [["run", "--sed", "1"], ["run", "--seed", "one"], ["walk"], []])
def test_bad_arguments_are_refused(capsys, words):
    assert refused(capsys, *words)


def test_help_and_a_missing_file_do_not_import_torch():
    code = ("import sys\nfrom rlhf_course.pipeline import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'datasets', 'peft', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy")
    for words in (["--help"], ["run", "--help"], ["run", "--data", "no/such/file.jsonl"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def killed_run(tmp_path: Path, seconds: float) -> Path:
    "The folder of a run that was killed after some seconds."
    out = tmp_path / f"killed-{seconds}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "rlhf_course", "run", "--fast", "--out", str(out)], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return out


def check_nothing_is_half_written(out: Path) -> None:
    "What stands under its name is complete; what is not complete has a temporary name."
    from safetensors import safe_open

    for path in out.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(out).parts) or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert list(tensors.keys())
    if (out / "policy").exists():
        assert (out / "policy" / "config.json").exists() and (out / "policy" / "tokenizer.json").exists()


@pytest.mark.parametrize("seconds", [12.0])
def test_killed_run(tmp_path, seconds):
    check_nothing_is_half_written(killed_run(tmp_path, seconds))


@pytest.mark.long
@pytest.mark.parametrize("seconds", [4.0, 8.0, 16.0, 20.0, 24.0, 28.0, 32.0, 36.0])
def test_killed_run_at_many_moments(tmp_path, seconds):
    check_nothing_is_half_written(killed_run(tmp_path, seconds))


def test_only_the_offer_of_a_kernel_is_kept_from_the_screen():
    """bitsandbytes says at import that it could be faster; anything else it has to say still shows."""
    code = ("import logging; from rlhf_course.pipeline import _quiet_libraries; _quiet_libraries(); log = logging.getLogger('bitsandbytes.backends.cpu.ops'); "
            "log.warning('Failed to load CPU gemm_4bit_forward from %s', 'somewhere'); log.warning('something else')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "something else\n", done.stderr
