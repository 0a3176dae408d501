"""The reward model under bad input and bad luck: killed, short of disk, with torn checkpoints, with data that make no sense."""

import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, DebertaV2Config, LlamaConfig, MistralConfig

from rlhf_course.loading import comparisons_from_rows
from rlhf_course.padding import pad_batch, tokenize_pairs
from rlhf_course.reward_model import (
    RewardConfig,
    RewardTrainer,
    add_lora,
    bradley_terry_loss,
    evaluate_rewards,
    last_whole_checkpoint,
    reward_batches,
    save_reward_model,
    train_reward_model,
)
from rlhf_course.scoring import (
    ensure_pad_token,
    head_layers,
    new_reward_model,
    reads_packed_rows,
    score_in_groups,
    score_packed,
    score_responses,
    score_sequences,
)
from rlhf_course.shared_batches import share_prefixes
from rlhf_course.tiny_arena import sample_comparisons, tiny_arena
from rlhf_course.tiny_lm import load_tiny_lm, tiny_lm_folder

SMALL = RewardConfig(batch_size=12, check_every=3)
_, TOKENIZER = load_tiny_lm()
# arguments: folder of the checkpoints, file for the weights, bits, largest file that may be written after the first checkpoint (0: no limit)
TRAINING = """
import resource, sys
from pathlib import Path
from safetensors.torch import save_file
from transformers import TrainerCallback
import rlhf_course.reward_model as rm
from rlhf_course.loading import comparisons_from_rows
from rlhf_course.tiny_arena import sample_comparisons, tiny_arena
from rlhf_course.tiny_lm import load_tiny_lm, tiny_lm_folder

folder, weights, bits, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
class Steps(rm.ProgressBar):
    def on_step_begin(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
    def on_save(self, args, state, control, **kwargs):
        if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
rm.ProgressBar = Steps
_, tokenizer = load_tiny_lm()
rows, _ = comparisons_from_rows(sample_comparisons(tiny_arena(), 216, seed=0, responses_per_prompt=4))
train, valid = rows.select(range(180)), rows.select(range(180, len(rows)))
model = rm.new_reward_model(tiny_lm_folder(), tokenizer, 0, bits)
trained, log = rm.train_reward_model(model, tokenizer, train, rm.RewardConfig(batch_size=12, check_every=3), folder, valid)
save_file({name: p.detach().contiguous() for name, p in trained.named_parameters() if p.requires_grad}, weights)
print("end", len([entry for entry in log if "eval_loss" in entry]), flush=True)
"""


def arguments(folder: Path, name: str, bits: int, limit: int = 0) -> list[str]:
    """The command of one training whose checkpoints are in `folder/name`."""
    return [sys.executable, "-c", TRAINING, str(folder / name), str(folder / f"{name}.safetensors"), str(bits), str(limit)]


def comparisons(n: int, seed: int = 0, k: int = 4):
    """Comparisons of the Tiny Arena in the one schema."""
    return comparisons_from_rows(sample_comparisons(tiny_arena(), n, seed=seed, responses_per_prompt=k))[0]


@pytest.fixture(scope="module", params=[32, 4], ids=["float32", "4 bits"])
def undisturbed(request, tmp_path_factory):
    """Bits, weights after a training that nobody disturbed, and the seconds from its first step to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = subprocess.Popen(arguments(folder, "run", request.param), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    started = time.monotonic()
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert int(said.splitlines()[-1].removeprefix("end ")) >= 5  # judged every third step
    return request.param, (folder / "run.safetensors").read_bytes(), time.monotonic() - started


def killed_and_resumed(folder: Path, bits: int, after: float) -> tuple[bytes, int]:
    """The weights of a training that was killed `after` seconds from its first step, and the step at which it went on."""
    process = subprocess.Popen(arguments(folder, "run", bits), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "step 0\n"
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(arguments(folder, "run", bits), capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    first = again.stdout.splitlines()[0]
    return (folder / "run.safetensors").read_bytes(), int(first.split()[1])  # "step N", or "end N" where nothing was left to do


def test_killed_training_ends_the_same(undisturbed, tmp_path):
    """SIGKILL late in the training, so that there is a checkpoint to go on from; evaluation in between; bit-equal weights."""
    bits, weights, seconds = undisturbed
    resumed, step = killed_and_resumed(tmp_path, bits, 0.6 * seconds)
    assert resumed == weights and step > 0


@pytest.mark.long
@pytest.mark.parametrize("number", range(8))
def test_killed_at_any_moment_ends_the_same(number, undisturbed, tmp_path):
    """SIGKILL at random moments: in a step, while saving, between, before the first checkpoint."""
    bits, weights, seconds = undisturbed
    resumed, _ = killed_and_resumed(tmp_path, bits, random.Random(number).uniform(0, seconds))
    assert resumed == weights


def test_full_disk_leaves_the_last_checkpoint(undisturbed, tmp_path):
    """After the first checkpoint the system lets no file grow beyond 20 kB: an error, the first checkpoint whole, and the same weights in the end."""
    bits, weights, _ = undisturbed
    if bits != 32:
        pytest.skip("files are written alike, whatever the weights were")
    stopped = subprocess.run(arguments(tmp_path, "run", bits, 20_000), capture_output=True, text=True, timeout=600)
    assert stopped.returncode != 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert last_whole_checkpoint(tmp_path / "run").name == "checkpoint-3"
    again = subprocess.run(arguments(tmp_path, "run", bits), capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and again.stdout.startswith("step 3\n"), again.stderr
    assert (tmp_path / "run.safetensors").read_bytes() == weights


def trained_folder(folder: Path) -> Path:
    """A folder with two checkpoints."""
    train_reward_model(new_reward_model(tiny_lm_folder(), TOKENIZER), TOKENIZER, comparisons(72), SMALL, folder)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    return folder


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Two checkpoints, to be copied."""
    return trained_folder(tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_torn_checkpoint_is_skipped(name, damage, two_checkpoints, tmp_path):
    """Each file cut in half, empty or missing: a message, and the checkpoint before."""
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", two_checkpoints, folder], check=True)
    path = folder / "checkpoint-6" / name
    whole = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    with pytest.warns(UserWarning, match="checkpoint-6 is not whole"):
        assert last_whole_checkpoint(folder).name == "checkpoint-3"


def test_flipped_byte_is_noticed(two_checkpoints, tmp_path):
    """The optimizer's file has check sums."""
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", two_checkpoints, folder], check=True)
    path = folder / "checkpoint-6" / "optimizer.pt"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match="not whole"):
        assert last_whole_checkpoint(folder).name == "checkpoint-3"


def test_folders_without_checkpoints(tmp_path):
    """Nothing there, and things that only look like it."""
    assert last_whole_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) is None


def test_another_training_in_the_folder_is_refused(two_checkpoints):
    """Other numbers or other data in a folder: going on would mix two trainings."""
    model = new_reward_model(tiny_lm_folder(), TOKENIZER)
    flipped = comparisons(72).map(lambda row: {"winner": {"a": "b", "b": "a"}[row["winner"]]})
    others = [(comparisons(72), replace(SMALL, learning_rate=5e-4), model), (comparisons(66), SMALL, model), (comparisons(72, seed=1), SMALL, model),
              (flipped, SMALL, model), (comparisons(72), SMALL, new_reward_model(tiny_lm_folder(), TOKENIZER, seed=1))]  # fmt: skip
    for data, config, model in others:
        with pytest.raises(ValueError, match="output_dir"):
            train_reward_model(model, TOKENIZER, data, config, two_checkpoints)


def test_accumulated_gradients_are_those_of_the_large_batch():
    """Two batches of one block and one of two blocks take the same step, as both are means over equally many comparisons."""
    data, scores = comparisons(12), []
    prompts, responses = data["prompt"][:], data["response_a"][:]
    for batch_size, steps in ((6, 2), (12, 1)):
        config = RewardConfig(batch_size=batch_size, accumulation_steps=steps)
        model, log = train_reward_model(new_reward_model(tiny_lm_folder(), TOKENIZER), TOKENIZER, data, config)
        scores.append(score_responses(model, TOKENIZER, prompts, responses))
    untrained = score_responses(add_lora(new_reward_model(tiny_lm_folder(), TOKENIZER), SMALL), TOKENIZER, prompts, responses)
    assert_close(scores[0], scores[1], atol=1e-3, rtol=0)
    assert (scores[0] - untrained).abs().max() > 0.05  # a step was taken


def test_early_stopping_returns_the_best(tmp_path):
    """With a learning rate that ruins the model the loss rises: training stops early, and the weights of the best evaluation come back."""
    config = replace(SMALL, learning_rate=0.3, head_learning_rate=0.3, warmup_ratio=0.0, n_epochs=6, patience=2, check_every=2)
    train, valid = comparisons(72), comparisons(48, seed=5)
    model, log = train_reward_model(new_reward_model(tiny_lm_folder(), TOKENIZER), TOKENIZER, train, config, tmp_path, valid)
    judged = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(judged) < 18 and judged.index(min(judged)) == len(judged) - 3
    assert_close(evaluate_rewards(model, TOKENIZER, valid)[0]["log_loss"], min(judged), atol=1e-3, rtol=1e-3)


def test_patience_needs_held_out_comparisons():
    """Refused before anything is trained."""
    with pytest.raises(ValueError, match="valid"):
        train_reward_model(new_reward_model(tiny_lm_folder(), TOKENIZER), TOKENIZER, comparisons(12), replace(SMALL, patience=1))


def test_loss_that_is_no_number_stops_and_names_the_rows():
    """A weight is NaN: the message has the step and the rows of the batch."""
    model, data = new_reward_model(tiny_lm_folder(), TOKENIZER), comparisons(24)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1, in the batch of rows \[") as caught:
        train_reward_model(model, TOKENIZER, data, SMALL)
    rows = [int(number) for number in str(caught.value).partition("[")[2].partition("]")[0].split(",")]
    assert 10 <= len(rows) <= 12 and set(rows) < set(range(len(data)))  # a row with identical responses may have been dropped


@pytest.mark.parametrize("winners", [["a"] * 12, ["tie"] * 12, ["a"]], ids=["one class only", "nothing but ties", "one row"])
def test_odd_labels_can_be_trained_on(winners):
    """Odd, but no reason to crash: the losses are finite, and metrics are null where nothing was decided."""
    rows = comparisons(12).to_list()[: len(winners)]
    data, _ = comparisons_from_rows([row | {"winner": winner} for row, winner in zip(rows, winners)])
    model, log = train_reward_model(new_reward_model(tiny_lm_folder(), TOKENIZER), TOKENIZER, data, SMALL, valid=data)
    metrics, margins = evaluate_rewards(model, TOKENIZER, data)
    assert torch.isfinite(margins).all() and (metrics["accuracy"] is None) == (set(winners) == {"tie"})


def test_validation_set_of_one(tmp_path):
    """Judged like any other."""
    one = comparisons(1, seed=9, k=2)
    _, log = train_reward_model(new_reward_model(tiny_lm_folder(), TOKENIZER), TOKENIZER, comparisons(36), SMALL, tmp_path, one)
    assert [entry["eval_accuracy"] in (0.0, 0.5, 1.0) for entry in log if "eval_loss" in entry] == [True]


def test_identical_responses_give_log_2():
    """The loaders drop such rows; one that comes another way teaches nothing and breaks nothing."""
    data = comparisons(2, k=2)
    same = data.map(lambda row: {"response_b": row["response_a"]})
    metrics, margins = evaluate_rewards(new_reward_model(tiny_lm_folder(), TOKENIZER), TOKENIZER, same)
    assert margins.abs().max() == 0 and abs(metrics["log_loss"] - 0.6931472) < 1e-6 and metrics["accuracy"] == 0.5


def test_unknown_winner_is_refused():
    """A label that is none of a, b, tie."""
    data = comparisons(3, k=2).map(lambda row: {"winner": "c"})
    with pytest.raises((ValueError, KeyError), match="winner|c"):
        tokenize_pairs(data, TOKENIZER)


def test_pad_token_is_chosen_and_said():
    """No pad token, or the end token as pad: a new token, a sentence, and embeddings that grow."""
    _, tokenizer = load_tiny_lm()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="ensure_pad_token"):
        new_reward_model(tiny_lm_folder(), tokenizer)
    assert "<|pad|>" in ensure_pad_token(tokenizer)
    model = new_reward_model(tiny_lm_folder(), tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id == len(tokenizer) - 1 < model.get_input_embeddings().num_embeddings
    assert torch.isfinite(score_responses(model, tokenizer, ["tell me how"], ["boil water ."])).all()


def test_model_without_known_targets():
    """The error lists what there is, and naming one of them works."""
    model = new_reward_model(tiny_lm_folder(), TOKENIZER)
    for layer in model.model.layers:
        layer.self_attn.query_of_mine = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(ValueError, match="query_of_mine"):
        add_lora(model, SMALL)
    assert any("query_of_mine.lora_A" in name for name, _ in add_lora(model, SMALL, ["query_of_mine"]).named_parameters())


@pytest.mark.parametrize("bits", [0, 16, "4"])
def test_unknown_bits(bits):
    """Refused with the numbers that there are."""
    with pytest.raises(ValueError, match=r"\[32, 8, 4\]"):
        new_reward_model(tiny_lm_folder(), TOKENIZER, bits=bits)


@pytest.mark.parametrize("field, value", [("lora_r", 0), ("batch_size", -1), ("label_smoothing", 1.0), ("margin", -1.0), ("patience", 0), ("accumulation_steps", 0), ("centring", -0.1)])
def test_config_refuses(field, value):
    """Each field says what it may be."""
    with pytest.raises(ValueError, match=field):
        RewardConfig(**{field: value})


def tiny(config):
    """A classifier of random weights."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 1, "pad_token_id": 0}


def test_which_models_read_packed_rows():
    """A Llama does; a model with a sliding window and an encoder do not."""
    assert reads_packed_rows(tiny(LlamaConfig(**SIZES)))
    assert not reads_packed_rows(tiny(MistralConfig(**SIZES, sliding_window=4)))
    assert not reads_packed_rows(tiny(BertConfig(**SIZES)))


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_score_does_not_depend_on_the_company(bits):
    """Alone, padded on either side, packed behind a shared prompt in rows of three lengths; 8 bits only nearly, as documented."""
    atol = 0.05 if bits == 8 else 1e-5
    model = new_reward_model(tiny_lm_folder(), TOKENIZER, bits=bits).eval()
    rows = tokenize_pairs(comparisons(12), TOKENIZER).to_list()
    sequences = [row[f"input_ids_{side}"] for row in rows for side in "ab"]
    with torch.no_grad():
        alone = torch.cat([score_sequences(model, *pad_batch([ids], 0)) for ids in sequences])
        for side in ("left", "right"):
            assert_close(score_sequences(model, *pad_batch(sequences, 0, side)), alone, atol=atol, rtol=0)
        for row_length in (1, 100, 4000):
            assert_close(score_packed(model, share_prefixes([[ids] for ids in sequences], 0, row_length)), alone, atol=atol, rtol=0)


def test_quantized_model_is_saved_as_an_adapter(tmp_path):
    """Merging into 4 bits would round the sum: the adapter alone is saved, and gives the same scores on the same backbone."""
    data = comparisons(24)
    model, _ = train_reward_model(new_reward_model(tiny_lm_folder(), TOKENIZER, bits=4), TOKENIZER, data, SMALL)
    before = score_responses(model, TOKENIZER, data["prompt"][:], data["response_a"][:])
    assert save_reward_model(model, TOKENIZER, tmp_path) is model and not (tmp_path / "merged").exists()
    again = PeftModel.from_pretrained(new_reward_model(tiny_lm_folder(), TOKENIZER, bits=4), tmp_path / "adapter")
    assert_close(score_responses(again, TOKENIZER, data["prompt"][:], data["response_a"][:]), before, atol=1e-5, rtol=0)


def test_dialogues_are_judged_as_they_are_trained_on(tmp_path):
    """Comparisons with several turns: evaluation reads the same tokens as training does."""
    plain = comparisons(12)
    turns = [{"role": "user", "content": "tell me how"}, {"role": "assistant", "content": "good luck !"}]
    data = plain.map(lambda row: {f"messages_{side}": [*turns, {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[f"response_{side}"]}] for side in "ab"})
    model, log = train_reward_model(new_reward_model(tiny_lm_folder(), TOKENIZER), TOKENIZER, data, SMALL, tmp_path, data)
    judged = [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    assert_close(judged, evaluate_rewards(model, TOKENIZER, data)[0]["log_loss"], atol=1e-5, rtol=1e-5)
    assert abs(judged - evaluate_rewards(model, TOKENIZER, plain)[0]["log_loss"]) > 1e-4


def test_order_of_the_rows_costs_nothing():
    """Comparisons that share responses find each other wherever they stand."""
    data = comparisons(280, k=8)
    sizes = [sorted(map(len, reward_batches(rows, TOKENIZER, RewardConfig())[1].blocks)) for rows in (data, data.shuffle(seed=0))]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 10


@pytest.mark.parametrize("shapes", [((3, 1), (3, 1), (3,)), ((3,), (4,), (3,)), ((3,), (3,), (3, 1))])
def test_loss_refuses_shapes_that_would_broadcast(shapes):
    """(B, 1) minus (B,) is (B, B): an error, not a wrong number."""
    a, b, labels = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="squeeze"):
        bradley_terry_loss(a, b, labels.long())


def test_evaluation_is_the_plain_likelihood():
    """Margin, smoothing and centring change the loss that is trained, not the one that judges."""
    data = comparisons(12)
    config = replace(SMALL, margin=1.0, label_smoothing=0.2, centring=1.0, check_every=1)
    model, log = train_reward_model(new_reward_model(tiny_lm_folder(), TOKENIZER), TOKENIZER, data, config, valid=data)
    [judged] = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert_close(judged, evaluate_rewards(model, TOKENIZER, data)[0]["log_loss"], atol=1e-5, rtol=1e-5)


@pytest.fixture
def process_group():
    """A group of one process, as `DistributedDataParallel` needs one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel], ids=["DistributedDataParallel", "DataParallel"])
def test_wrapped_model_scores_and_learns_the_same(wrap, process_group):
    """Padded, in groups, packed and from text; and the gradient that passes through the wrapper is that of the bare model."""
    model = add_lora(new_reward_model(tiny_lm_folder(), TOKENIZER), SMALL)
    data = comparisons(12)
    rows = tokenize_pairs(data, TOKENIZER).to_list()
    sequences = [row["input_ids_a"] for row in rows]
    batch, wrapped = pad_batch(sequences, TOKENIZER.pad_token_id), wrap(model)
    grads = []
    for each in (model, wrapped):
        model.zero_grad()
        score_in_groups(each, *batch).pow(2).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert grads[0].norm() > 0
    assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)
    assert reads_packed_rows(wrapped)
    with torch.no_grad():
        alone = score_sequences(model, *batch)
        assert_close(score_sequences(wrapped, *batch), alone, atol=1e-5, rtol=0)
        assert_close(score_packed(wrapped, share_prefixes([[ids] for ids in sequences], TOKENIZER.pad_token_id)), alone, atol=1e-5, rtol=0)
    assert_close(score_responses(wrapped, TOKENIZER, data["prompt"][:], data["response_a"][:]), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config, new", [(DebertaV2Config, ["pooler", "classifier"]), (BertConfig, ["classifier", "bert.pooler.dense"])], ids=["DeBERTa", "BERT without pooler"])
@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["q, k, v", "all linear"])
def test_pooler_is_trained_and_saved(config, new, targets, tmp_path):
    """An encoder whose pooler starts from noise: trained, saved with the adapter, and the same scores on a fresh copy with other noise."""
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pooler_hidden_size": 32}
    torch.manual_seed(0)
    backbone = AutoModel.from_config(config(**sizes, max_position_embeddings=512, pad_token_id=TOKENIZER.pad_token_id))
    backbone.pooler = None
    backbone.save_pretrained(tmp_path / "backbone")
    data = comparisons(24)
    texts = data["prompt"][:], data["response_a"][:]
    model = new_reward_model(tmp_path / "backbone", TOKENIZER)
    assert head_layers(model) == new
    at_first = {name: value.clone() for name, value in model.state_dict().items()}
    trained, _ = train_reward_model(model, TOKENIZER, data, replace(SMALL, target_modules=targets))
    before = score_responses(trained, TOKENIZER, *texts)
    moved = {name for name, p in trained.named_parameters() if p.requires_grad and "pooler" in name}
    assert moved and not any("lora_" in name for name in moved)
    for name in moved:
        assert not torch.equal(trained.get_parameter(name), at_first[name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")])
    save_reward_model(trained, TOKENIZER, tmp_path)
    fresh = new_reward_model(tmp_path / "backbone", TOKENIZER, seed=1)
    assert not torch.equal(fresh.state_dict()[f"{new[0]}.dense.weight" if new[0] == "pooler" else f"{new[1]}.weight"],
                           at_first[f"{new[0]}.dense.weight" if new[0] == "pooler" else f"{new[1]}.weight"])  # fmt: skip
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    for other in (again, merged):
        assert_close(score_responses(other, TOKENIZER, *texts), before, atol=1e-5, rtol=0)


def test_trainer_is_transformers():
    """What the lesson says: a subclass, so all that the library can do is there."""
    from transformers import Trainer

    assert issubclass(RewardTrainer, Trainer)
