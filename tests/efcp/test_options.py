"""Which keys of param groups are taken for misspelt options."""

import inspect
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

import efcp
from efcp.options import edits, made_from, misspelt

CLASSES = [efcp.SparseMFAC, efcp.DenseMFAC, efcp.LowRankMFAC, efcp.SparseGGT, efcp.DenseGGT, efcp.LowRankGGT]
OPTIONS = {cls: tuple(name for name in inspect.signature(cls).parameters if name != "params") for cls in CLASSES}
ALL = tuple(dict.fromkeys(name for names in OPTIONS.values() for name in names))
LONG = [name for name in ALL if sum(map(str.isalpha, name)) >= 5]
OTHERS = {  # of param groups, by who puts them there
    "torch.optim": "params param_names betas nesterov dampening amsgrad eps lambd alpha etas step_sizes rho centered "
    "decoupled_weight_decay lr_decay initial_accumulator_value momentum_decay trust_region ns_coefficients ns_steps "
    "adjust_lr_fn foreach fused capturable differentiable",
    "schedulers": "initial_lr min_lr max_lr base_momentum max_momentum swa_lr lr_scale lr_mult lr_multiplier lr_max "
    "scheduled_lr warmup_steps warmup_init wd_schedule momentum_schedule final_lr decay_mult weight_decay_scale",
    "models": "name layer_id layer_name group_name fix_lr is_expert is_bias no_decay moe allreduce fsdp fsdp_units "
    "sharding_axis module_name tag scale mapping moments identity",
    "pytorch_optimizer": "rho adaptive k alpha r train_mode weight_lr_power weight_sum weight_decouple cautious "
    "use_muon use_gc fixed_decay ams_bound adanorm adanorm_r adam_debias use_adjusted_lr gamma beta beta2 beta3 "
    "rectify d lr_1d_factor weight_decay_1d weight_decay_type betas_1d counter step sn nu nus use_shadow constant "
    "constraint merge_dims max_dim norm_type delta d_numerator min_beta1 beta1_warmup step_size eps1 eps2 eps_2 "
    "eps_root stable_weight_decay adjusted_momentum moving_average_for_momentum memory_length update_proj_gap "
    "projection_type precondition_dtype compute_dtype mu_dtype power_iteration_steps lambda_rank correct_bias",
    "other wrappers": "lookahead_k lookahead_alpha lookahead_step slow_buffer max_grad_norm clip_norm update_norm "
    "loss_scale grad_scale ema_decay sam_rho window_size window_type",
}


def test_an_option_of_another_type_is_checked_although_it_is_equal():
    assert made_from(efcp.MFAC(), {"damping": 0.1, "relative": True}) == efcp.MFAC(0.1, True)
    with pytest.raises(ValueError, match="relative must be True or False, got 1"):
        made_from(efcp.MFAC(), {"damping": 0.1, "relative": 1})


@pytest.mark.parametrize("who", OTHERS)
def test_keys_of_others_are_not_misspelt_options(who):
    for key in OTHERS[who].split():
        assert key in ALL or misspelt(key, ALL) is None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=lambda names: " ".join(names[2:4]))
def test_options_are_not_misspelt(options):
    assert [misspelt(name, options) for name in options] == [None] * len(options)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("densty", "density"),
        ("blocksize", "block_size"),
        ("weightdecay", "weight_decay"),
        ("weight_decay_", "weight_decay"),
        ("maximise", "maximize"),
        ("windows", "window"),
        ("wnidow", "window"),
        ("Momentum", "momentum"),
        ("LR", "lr"),
        ("beta_1", "beta1"),
        ("max-update-norm", "max_update_norm"),
    ],
)
def test_misspelt_options(key, meant):
    assert misspelt(key, ALL) == meant


def slip(name, kind, at, letter):
    if kind == "insert":
        return name[:at] + letter + name[at:]
    if kind == "delete":
        return name[:at] + name[at + 1 :]
    if kind == "replace":
        return name[:at] + letter + name[at + 1 :]
    return name[:at] + name[at + 1 : at + 2] + name[at : at + 1] + name[at + 2 :]


@st.composite
def with_slips(draw, name, count):
    """One slip in each of `count` parts of the name: an insertion between swapped letters would count as three."""
    size, key = len(name) // count, ""
    for first in range(0, size * count, size):
        part = name[first : first + size]
        kind = draw(st.sampled_from(["insert", "delete", "replace", "swap"]))
        key += slip(part, kind, draw(st.integers(0, size - 1)), draw(st.sampled_from(string.ascii_lowercase)))
    return key + name[size * count :]


@given(st.data())
def test_one_slip_is_found(data):
    """In every option of five letters and more; two options may be as near."""
    key = data.draw(with_slips(data.draw(st.sampled_from(LONG)), 1))
    assert key in ALL or misspelt(key, ALL) is not None


@given(st.data())
def test_two_slips_in_long_names_are_found(data):
    name = data.draw(st.sampled_from([name for name in LONG if sum(map(str.isalpha, name)) >= 10]))
    key = data.draw(with_slips(name, 2))
    assert key in ALL or misspelt(key, ALL) is not None


@given(st.text(max_size=30))
def test_any_text_may_be_a_key(key):
    misspelt(key, ALL)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "abc", 0),
        ("abc", "acb", 1),
        ("abcd", "badc", 2),
        ("damping", "dampening", 2),
        ("kitten", "sitting", 3),
        ("window", "w", 5),
    ],
)
def test_edits(a, b, distance):
    assert edits(a, b) == edits(b, a) == distance
