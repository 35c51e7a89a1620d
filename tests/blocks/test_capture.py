"""Blocks are found, and driven one after another they are the model, whatever its family."""

import copy

import pytest
import torch
import transformers
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from apiq.blocks.activations import Activations, Home, batches, mean_squared_error
from apiq.blocks.architecture import KEPT, find_blocks, linears, replace, text_model
from apiq.blocks.arguments import BlockCall, PerWindow, Repeated
from apiq.blocks.capture import PADDING, capture, completed
from apiq.blocks.unfuse import unfuse
from apiq.errors import ApiqError
from tests.families.zoo import BLOCKS, WORDS, ZOO

CPU = torch.device("cpu")
HOME = Home("device", CPU)


UNUSUAL = {
    "bloom": hf.BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=BLOCKS, n_head=4, pad_token_id=0),
    "codegen": hf.CodeGenConfig(vocab_size=WORDS, n_embd=32, n_layer=BLOCKS, n_head=4, rotary_dim=4, n_positions=64),
    "falcon": hf.FalconConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=BLOCKS, num_attention_heads=4, alibi=True,
        new_decoder_architecture=False,
    ),
    "gpt_neo": hf.GPTNeoConfig(
        vocab_size=WORDS, hidden_size=32, num_layers=3, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local", "global"], 1]],
    ),
    "gptj": hf.GPTJConfig(vocab_size=WORDS, n_embd=32, n_layer=BLOCKS, n_head=4, rotary_dim=4, n_positions=64),
    "mpt": hf.MptConfig(vocab_size=WORDS, d_model=32, n_layers=BLOCKS, n_heads=4, max_seq_len=64),
    "xglm": hf.XGLMConfig(
        vocab_size=WORDS, d_model=32, ffn_dim=48, num_layers=BLOCKS, attention_heads=4, max_position_embeddings=64
    ),
}  # fmt: skip
"""Families whose blocks return tuples, or get arguments with rows for each window (ALiBi, masks of a checked shape)."""


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_families_are_driven_block_by_block_to_their_own_logits(name, padded):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNUSUAL[name]).eval()
    blocks = find_blocks(model).modules
    windows = torch.randint(4, WORDS, (5, 24))
    if padded:
        windows[1, 20:] = windows[3, 10:] = PADDING
    mask = {"attention_mask": (windows != PADDING).long()} if padded else {}
    X, calls = capture(model, blocks, windows, torch.float32, lambda shape: HOME)
    with torch.no_grad():
        ids = windows.masked_fill(windows == PADDING, getattr(model.config, "pad_token_id", None) or 0)
        expected = model(input_ids=ids, use_cache=False, **mask).logits
        for block, call in zip(blocks, calls, strict=True):
            X = X.mapped(lambda hidden, batch, block=block, call=call: call.run(block, hidden, batch), batch_size=5)
        assert torch.equal(completed(model, blocks, windows.clamp(min=0), X.rows), expected)


def test_a_mixture_that_asks_for_the_loss_of_its_routers_is_completed_without_it():
    torch.manual_seed(0)
    config = copy.deepcopy(ZOO["mixtral"].config)
    config.output_router_logits = True
    model = AutoModelForCausalLM.from_config(config).eval()
    windows, hidden = torch.randint(4, WORDS, (2, 8)), torch.randn(2, 8, config.hidden_size)
    with torch.no_grad():
        found = completed(model, find_blocks(model).modules, windows, hidden)
        assert torch.equal(found, model.lm_head(model.model.norm(hidden)))


@pytest.fixture(params=ZOO)
def member(request):
    return ZOO[request.param]


@pytest.mark.parametrize("padded", [False, True])
def test_blocks_driven_one_by_one_equal_the_model_bit_for_bit(member, padded):
    torch.manual_seed(0)
    model = getattr(transformers, member.head)(member.config).eval()
    blocks = find_blocks(model)
    assert len(blocks.modules) == BLOCKS
    windows = torch.randint(4, WORDS, (5, 24))
    if padded:
        windows[1, 20:] = windows[3, 10:] = PADDING
    X, calls = capture(model, blocks.modules, windows, torch.float32, lambda shape: HOME)
    with torch.no_grad():
        mask = {"attention_mask": (windows != PADDING).long()} if padded else {}
        ids = windows.masked_fill(windows == PADDING, 0)
        expected = text_model(model)(input_ids=ids, output_hidden_states=True, **mask).hidden_states
    assert torch.equal(X.rows, expected[0])
    for index, (block, call) in enumerate(zip(blocks.modules, calls, strict=True)):
        X = X.mapped(lambda hidden, batch, block=block, call=call: call.run(block, hidden, batch), batch_size=5)
        if index + 1 < BLOCKS:  # the last hidden state that the model returns is behind the norm
            assert torch.equal(X.rows, expected[index + 1])


def test_unfused_blocks_hold_every_linear_and_compute_the_same_bits(member):
    torch.manual_seed(0)
    model = getattr(transformers, member.head)(member.config).eval()
    blocks = find_blocks(model)
    windows = torch.randint(4, WORDS, (3, 16))
    X, calls = capture(model, blocks.modules, windows, torch.float32, lambda shape: HOME)
    for block, call, count in zip(blocks.modules, calls, member.counts, strict=True):
        matrices = sum(p.numel() for p in block.parameters() if p.dim() > 1)
        before = X.mapped(lambda hidden, batch, block=block, call=call: call.run(block, hidden, batch), 2)
        found = linears(unfuse(block))
        assert len(found) == count
        routers = sum(p.numel() for name, p in block.named_parameters() if KEPT.search(name))
        assert sum(linear.weight.numel() for linear in found.values()) == matrices - routers
        after = X.mapped(lambda hidden, batch, block=block, call=call: call.run(block, hidden, batch), 2)
        assert torch.equal(after.rows, before.rows)
        X = after


def test_a_model_that_works_between_its_blocks_is_refused():
    model = LlamaForCausalLM(ZOO["llama"].config).eval()
    second = model.model.layers[1]

    class Shifted(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return second(hidden_states + 1, **kwargs)

    blocks = nn.ModuleList(model.model.layers)
    model.model.layers[1] = Shifted()
    with pytest.raises(ApiqError, match="between its LlamaDecoderLayer blocks 0 and 1"):
        capture(model, blocks, torch.randint(4, WORDS, (2, 8)), torch.float32, lambda shape: HOME)


def test_capture_leaves_the_model_as_it_was():
    model = AutoModelForCausalLM.from_config(ZOO["llama"].config).eval()
    windows = torch.randint(0, 61, (2, 8))
    before = model(windows).logits
    capture(model, find_blocks(model).modules, windows, torch.float32, lambda shape: HOME)
    assert torch.equal(model(windows).logits, before)


def test_an_argument_of_the_tokens_is_that_of_each_window_though_the_first_and_the_last_are_alike():
    torch.manual_seed(0)
    config = hf.Gemma4TextConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=WORDS, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], sliding_window=8,
    )  # fmt: skip
    model = hf.Gemma4ForCausalLM(config).eval()
    first, second = torch.randint(4, WORDS, (2, 1, 12))
    windows = torch.cat([first, second, first])
    _, calls = capture(model, find_blocks(model).modules, windows, torch.float32, lambda shape: HOME)
    per_layer = [value for value in (*calls[0].args, *calls[0].kwargs.values()) if isinstance(value, PerWindow)]
    assert per_layer and not torch.equal(per_layer[0].values[0], per_layer[0].values[1])


@pytest.mark.parametrize(
    ("head", "config", "sentence"),
    [
        (
            "T5ForConditionalGeneration",
            hf.T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
            "T5ForConditionalGeneration has an encoder and a decoder",
        ),
        (
            "Zamba2ForCausalLM",
            hf.Zamba2Config(
                vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=8, chunk_size=8,
                layers_block_type=["mamba", "hybrid", "mamba"], layer_types=["mamba", "hybrid", "mamba"],
            ),
            r"layers are of several classes, Zamba2MambaDecoderLayer, Zamba2HybridLayer",
        ),
        (
            "RwkvForCausalLM",
            hf.RwkvConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, context_length=64),
            r"RwkvModel cannot be run around its RwkvBlock blocks \(.*\); such a model cannot",
        ),
        (
            "Gemma3nForCausalLM",
            hf.Gemma3nTextConfig(
                vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, sliding_window=8, vocab_size_per_layer_input=WORDS,
                hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=0,
                layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0],
            ),
            r"hidden states of shape \(4, 1, 12, 32\) for windows \(1, 12\), not one vector a token",
        ),
    ],
)  # fmt: skip
def test_a_family_that_cannot_be_driven_is_refused_in_a_sentence(head, config, sentence):
    model = getattr(transformers, head)(config).eval()
    windows = torch.randint(4, WORDS, (2, 12))
    with pytest.raises(ApiqError, match=sentence):
        capture(model, find_blocks(model).modules, windows, torch.float32, lambda shape: HOME)


def test_what_all_blocks_share_is_moved_once(monkeypatch):
    shared, known, moves = torch.ones(1, 4), {}, []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *given: moves.append(given) or original(self, *given))
    calls = [BlockCall((shared,), {"mask": Repeated(shared)}).moved(torch.device("meta"), known) for _ in range(3)]
    assert len(moves) == 1
    assert all(call.args[0] is call.kwargs["mask"].values is calls[0].args[0] for call in calls)


def test_a_model_without_blocks_is_refused_with_what_was_looked_for():
    with pytest.raises(ApiqError, match=r"no transformer blocks .* nn.ModuleList"):
        find_blocks(nn.Sequential(nn.Linear(3, 3)))


def test_the_list_with_the_most_weights_is_chosen():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    assert find_blocks(Model()).path == "layers"


def test_replace_reaches_into_a_block():
    block = nn.Sequential(nn.Sequential(nn.Linear(2, 3)))
    replace(block, "0.0", nn.Linear(2, 5))
    assert block[0][0].out_features == 5


def test_batches_cover_everything_once():
    assert [list(range(10))[s] for s in batches(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_activations_are_handed_out_and_taken_back():
    rows = Activations.empty((4, 2, 3), torch.float32, HOME)
    rows[slice(0, 4)] = torch.arange(24.0).reshape(4, 2, 3)
    doubled = rows.mapped(lambda x, batch: 2 * x, 3)
    assert torch.equal(doubled.rows, 2 * rows.rows)
    assert torch.equal(doubled[slice(1, 2)], 2 * rows[slice(1, 2)])


def test_the_mean_squared_error_does_not_depend_on_the_batches():
    targets = Activations(torch.randn(5, 2, 3), HOME)
    outputs = torch.randn(5, 2, 3)
    expected = torch.nn.functional.mse_loss(outputs.double(), targets.rows.double()).item()
    for size in (1, 2, 5):
        assert mean_squared_error(lambda batch: outputs[batch], targets, size) == pytest.approx(expected, rel=1e-6)
