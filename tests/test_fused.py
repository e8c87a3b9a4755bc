"""The chunked head + loss against float64 references written from the formulas, and other libraries."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import assert_relative, by_formula
from torch._subclasses.fake_tensor import FakeTensorMode

from learner import fused, liger
from learner.fused import LogitTransform, Objective, Targets, weighted_loss
from learner.objective import divergence

T, V, D, PADDED, K = 13, 29, 8, 32, 5
BETA = 0.3


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(fused, "chunk_size", lambda vocab_size, device: 4)


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return {
        "states": torch.randn(T, D),
        "head": torch.randn(PADDED, D),
        "weights": torch.rand(T),
        "teacher_states": torch.randn(T, D),
        "teacher_head": torch.randn(PADDED, D),
        "labels": torch.randint(0, V, (T,)),
        "behaviour": -3 + torch.randn(T),
        "sequence": torch.tensor([0] * 6 + [1] * 7),
    }


def log_probs(states, head, objective):
    z = states @ head[:V].T * objective.transform.scale
    if objective.transform.softcap:
        z = objective.transform.softcap * torch.tanh(z / objective.transform.softcap)
    return (z / objective.temperature).log_softmax(-1)


def categories(probs, ids, tail):
    """Probabilities of the chosen ids, and of the rest or renormalised."""
    chosen = probs.gather(-1, ids)
    if tail:
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)
    return chosen / chosen.sum(-1, keepdim=True)


def targets_for(x, objective, ids):
    """What a teacher would ship, computed in float64."""
    logq = log_probs(x["teacher_states"].double(), x["teacher_head"].double(), objective)
    chosen = logq.gather(-1, ids)
    rest = logq.exp().scatter(-1, ids, 0).sum(-1).log()
    return Targets(
        labels_T=x["labels"], behaviour_T=x["behaviour"], sequence_T=x["sequence"],
        states_TD=x["teacher_states"], heads=((T, x["teacher_head"]),),
        ids_TK=ids, logprobs_TK=chosen.float(), tail_T=rest.float(),
    )  # fmt: skip


def reference(x, objective, name, ids):
    """Loss and gradients in float64 by autograd through the formula."""
    states, head = (x[name].double().detach().clone().requires_grad_() for name in ("states", "head"))
    logp = log_probs(states, head, objective)
    logq = log_probs(x["teacher_states"].double(), x["teacher_head"].double(), objective)
    own = logp.gather(-1, x["labels"][:, None])[:, 0]
    if objective.kind == "full":
        per_token = by_formula(name, logp.exp(), logq.exp(), BETA)
    elif objective.kind == "chosen":
        p, q = (categories(d.exp(), ids, objective.tail) for d in (logp, logq))
        per_token = by_formula(name, p, q, BETA)
    elif objective.kind == "dft":
        per_token = -own * own.detach().exp()
    else:
        per_token = -own
    ratio = (own.detach() - x["behaviour"].double()).exp().clamp(max=objective.importance_clip)
    if objective.importance == "sequence":
        means = torch.stack([ratio[x["sequence"] == s].mean() for s in (0, 1)])
        ratio = means[x["sequence"]]
    if objective.importance == "none":
        ratio = torch.ones_like(ratio)
    if objective.token_clip is not None:
        per_token = per_token.clamp(max=objective.token_clip)
    loss = (per_token * ratio * x["weights"]).sum()
    loss.backward()
    return loss.detach(), states.grad, head.grad


def agree(x, objective, name=None, ids=None):
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(T)]) if ids is None else ids
    loss, grad_states, grad_head = reference(x, objective, name, ids)
    states, head = x["states"].clone().requires_grad_(), x["head"].clone().requires_grad_()
    got = weighted_loss(states, head, x["weights"], targets_for(x, objective, ids), objective, vocab_size=V)
    got.total.backward()
    assert_relative(got.total, loss)
    assert_relative(states.grad, grad_states)
    assert_relative(head.grad, grad_head)
    alone = x["states"].clone().requires_grad_()  # with a head that is not trained
    targets = targets_for(x, objective, ids)
    weighted_loss(alone, x["head"], x["weights"], targets, objective, vocab_size=V).total.backward()
    assert torch.equal(alone.grad, states.grad)
    return got


NAMES = ("forward_kl", "reverse_kl", "jsd")


@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
@pytest.mark.parametrize(("kind", "tail"), [("full", True), ("chosen", True), ("chosen", False)])
@pytest.mark.parametrize("name", NAMES)
def test_every_support_and_divergence(inputs, name, kind, tail, importance):
    for temperature, transform in itertools.product(
        (1.0, 0.7), (LogitTransform(), LogitTransform(scale=0.5), LogitTransform(scale=2.0, softcap=3.0))
    ):
        agree(
            inputs,
            Objective(
                kind=kind, divergence=divergence(name, BETA), tail=tail, temperature=temperature,
                importance=importance, transform=transform,
            ),
            name,
        )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_computes_the_same(inputs, name):
    transform = LogitTransform(scale=0.5)
    agree(
        inputs,
        Objective(
            kind="full", divergence=divergence(name, BETA), temperature=0.7, importance="token", transform=transform,
            compiled=True,
        ),
        name,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["cross_entropy", "dft"])
def test_compiled_imitation_computes_the_same(inputs, kind):
    x = {name: t.clone() for name, t in inputs.items()}
    x["head"][V:] = 1e4
    transform = LogitTransform(scale=0.5)
    found = [agree(x, Objective(kind=kind, transform=transform, compiled=compiled)) for compiled in (True, False)]
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("name", NAMES)
def test_the_sampled_token_is_one_chosen_id_with_a_tail(inputs, name):
    objective = Objective(kind="chosen", divergence=divergence(name, BETA))
    agree(inputs, objective, name, ids=inputs["labels"][:, None])


@pytest.mark.parametrize("name", NAMES)
def test_all_ids_chosen_is_full_support(inputs, name):
    everything = torch.arange(V).expand(T, V)
    full = agree(inputs, Objective(kind="full", divergence=divergence(name, BETA)), name)
    objective = Objective(kind="chosen", divergence=divergence(name, BETA))
    states = inputs["states"].clone().requires_grad_()
    targets = targets_for(inputs, objective, everything)
    got = weighted_loss(states, inputs["head"], inputs["weights"], targets, objective, vocab_size=V)
    got.total.backward()
    assert targets.tail_T.isneginf().all()
    assert_relative(got.total, full.total.detach())
    assert states.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["cross_entropy", "dft"])
def test_imitation(inputs, kind):
    got = agree(inputs, Objective(kind=kind))
    if kind == "cross_entropy":
        logits = inputs["states"] @ inputs["head"][:V].T
        expected = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
        torch.testing.assert_close(got.per_token, expected)


def test_token_clip_bounds_the_loss_and_its_gradient(inputs):
    objective = Objective(kind="full", token_clip=2.0)
    got = agree(inputs, objective, "forward_kl")
    assert (got.per_token > 2).any()
    assert (got.per_token < 2).any()


def test_a_small_case_by_finite_differences(inputs):
    """Central differences of the float64 value against our float64 gradient."""
    x = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    for name in NAMES:
        objective = Objective(kind="full", divergence=divergence(name, BETA))
        reference_loss, grad, _ = reference(x, objective, name, None)
        moved = []
        for sign in (1, -1):
            y = dict(x, states=x["states"].clone())
            y["states"][2, 3] += sign * 1e-5
            moved.append(reference(y, objective, name, None)[0])
        assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(grad[2, 3].item(), rel=1e-5)
        assert reference_loss > 0


@pytest.mark.fault("vocabulary padded to a round size", "huge weights in the padding", "padded ids take no part")
def test_padded_vocabulary_rows_take_no_part(inputs):
    for kind in ("full", "chosen", "cross_entropy"):
        x = {k: v.clone() for k, v in inputs.items()}
        x["head"][V:] = x["teacher_head"][V:] = 1e4
        got = agree(x, Objective(kind=kind), "forward_kl")
        assert got.total < 1e3


def test_same_view_gives_no_loss_and_no_gradient(inputs):
    x = dict(inputs, teacher_states=inputs["states"], teacher_head=inputs["head"])
    for name, kind in itertools.product(NAMES, ("full", "chosen")):
        objective = Objective(kind=kind, divergence=divergence(name, BETA))
        states = x["states"].clone().requires_grad_()
        ids = torch.stack([torch.randperm(V)[:K] for _ in range(T)])
        got = weighted_loss(states, x["head"], x["weights"], targets_for(x, objective, ids), objective, vocab_size=V)
        got.total.backward()
        assert got.total.abs() < 1e-5
        assert states.grad.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("module", "objective"),
    [
        (fused, Objective(kind="cross_entropy")),
        (fused, Objective(kind="cross_entropy", importance="sequence")),
        (liger, Objective(kind="full", liger_beta=0.0)),
    ],
)
@pytest.mark.fault("completions without a trained token", "an empty batch", "zero loss and gradient, never 0/0")
def test_no_tokens_give_zero_loss_and_zero_gradients(module, objective):
    """Ranks reduce the gradients of all weights together, and wait for one that has none."""
    if module is liger:
        pytest.importorskip("liger_kernel")
    states, head = torch.zeros(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    targets = Targets(labels_T=none, sequence_T=none, states_TD=torch.zeros(0, D))
    got = module.weighted_loss(states, head, torch.zeros(0), targets, objective, vocab_size=V)
    got.total.backward()
    assert got.total.item() == 0
    assert head.grad.abs().max() == 0
    assert states.grad.shape == (0, D)


def test_trl_computes_the_same(inputs):
    """TRL's loss functions as an oracle: full, top-k with and without tail, sampled token."""
    oracle = pytest.importorskip("trl.experimental.sdft.loss_utils")
    x = inputs
    for name, alpha in (("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", BETA)):
        for kind, tail in (("full", True), ("chosen", True), ("chosen", False)):
            states = x["states"].clone().requires_grad_()
            student, teacher = states @ x["head"][:V].T, x["teacher_states"] @ x["teacher_head"][:V].T
            if kind == "full":
                expected = oracle.compute_full_logit_self_distillation_loss(
                    student[None], teacher[None], distillation_alpha=alpha
                )[0]
            else:
                expected = oracle.compute_topk_self_distillation_loss(
                    student[None], teacher[None], distillation_topk=K, distillation_alpha=alpha,
                    distillation_add_tail=tail,
                )[0]  # fmt: skip
            (expected * x["weights"]).sum().backward()
            objective = Objective(kind=kind, divergence=divergence(name, BETA), tail=tail)
            ours = x["states"].clone().requires_grad_()
            targets = targets_for(x, objective, student.detach().topk(K).indices)
            got = weighted_loss(ours, x["head"], x["weights"], targets, objective, vocab_size=V)
            got.total.backward()
            assert_relative(got.per_token, expected.detach(), 2e-5)
            assert_relative(ours.grad, states.grad, 2e-5)


def test_trls_sampled_token_loss_has_the_score_function_gradient(inputs):
    oracle = pytest.importorskip("trl.experimental.sdft.loss_utils")
    x, states = inputs, inputs["states"].clone().requires_grad_()
    student, teacher = states @ x["head"][:V].T, x["teacher_states"] @ x["teacher_head"][:V].T
    expected = oracle.compute_sampled_token_self_distillation_loss(
        student[None], teacher[None], x["labels"][None], distillation_alpha=1.0
    )[0]
    (expected * x["weights"]).sum().backward()
    objective, ours = Objective(kind="policy_gradient"), x["states"].clone().requires_grad_()
    targets = targets_for(x, objective, x["labels"][:, None])
    got = weighted_loss(ours, x["head"], x["weights"], targets, objective, vocab_size=V)
    got.total.backward()
    assert_relative(ours.grad, states.grad)


@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
@pytest.mark.parametrize("kind", ["full", "chosen", "policy_gradient", "cross_entropy", "dft"])
def test_no_number_is_asked_of_the_device(inputs, kind, importance):
    """A GPU would be waited for in every micro-batch; fake tensors have no numbers, and raise an error."""
    with FakeTensorMode() as fake:
        x = {name: fake.from_tensor(tensor) for name, tensor in inputs.items()}
        objective = Objective(kind=kind, importance=importance, token_clip=1.0)
        targets = targets_for(x, objective, x["labels"][:, None])
        states, head = x["states"].requires_grad_(), x["head"].requires_grad_()
        weighted_loss(states, head, x["weights"], targets, objective, vocab_size=V).total.backward()
        assert states.grad.shape == (T, D)


@pytest.mark.parametrize("name", NAMES)
def test_ligers_kernel_computes_the_same(inputs, name):
    """As an oracle of ours, and as what loss.kernel=liger uses: over two teacher versions."""
    pytest.importorskip("liger_kernel")
    x, beta = inputs, {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}[name]
    plain = Objective(kind="full", divergence=divergence(name, BETA), temperature=0.7)
    targets = targets_for(x, plain, x["labels"][:, None])
    targets = replace(targets, heads=((T // 3, x["teacher_head"]), (T, 2 * x["teacher_head"])))
    found = []
    for loss, objective in ((weighted_loss, plain), (liger.weighted_loss, replace(plain, liger_beta=beta))):
        states, head = (x[key].clone().requires_grad_() for key in ("states", "head"))
        result = loss(states, head, torch.full((T,), 0.25), targets, objective, vocab_size=V)
        result.total.backward()
        found.append((result.total.detach(), states.grad, head.grad))
    for ours, theirs in zip(*found, strict=True):
        assert_relative(ours, theirs)


def test_in_bf16_ligers_kernel_is_the_less_exact_one():
    """Why loss.kernel=auto does not take it: error of the gradient by the states, against float64."""
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    n, vocab, width = 64, 4000, 64
    states, teacher_states = torch.randn(2, n, width).bfloat16()
    head, teacher_head = (torch.randn(2, vocab, width) / 4).bfloat16()
    targets = Targets(labels_T=torch.zeros(n, dtype=torch.long), states_TD=teacher_states, heads=((n, teacher_head),))
    exact = states.double().requires_grad_()
    logp = (exact @ head.double().T).log_softmax(-1)
    logq = (teacher_states.double() @ teacher_head.double().T).log_softmax(-1)
    (logq.exp() * (logq - logp)).sum(-1).mean().backward()
    errors = {}
    for name, loss, beta in (("ours", weighted_loss, None), ("liger", liger.weighted_loss, 0.0)):
        own = states.clone().requires_grad_()
        weights = torch.full((n,), 1 / n)
        loss(own, head, weights, targets, Objective(kind="full", liger_beta=beta), vocab_size=vocab).total.backward()
        errors[name] = ((own.grad.double() - exact.grad).norm() / exact.grad.norm()).item()
    print(f"relative error of the gradient in bf16: ours {errors['ours']:.1e}, Liger {errors['liger']:.1e}")
    assert errors["ours"] < errors["liger"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tensor_cores_sum_in_fp32(name, compiled, monkeypatch):
    """bf16 operands, whose products are summed over many chunks: as near to fp32 as their own rounding."""
    monkeypatch.setattr(fused, "chunk_size", lambda vocab_size, device: 16)
    torch.manual_seed(0)
    tokens, vocab, width = 512, 1024, 64
    drawn = [torch.randn(n, width).bfloat16() for n in (tokens, vocab, tokens, vocab)]
    objective = Objective(kind="full", divergence=divergence(name, BETA), compiled=compiled)

    def gradients(device, dtype):
        states, head, teacher_states, teacher_head = (t.to(device, dtype) for t in drawn)
        targets = Targets(
            labels_T=torch.zeros(tokens, dtype=torch.int64, device=device),
            states_TD=teacher_states,
            heads=((tokens, teacher_head / 8),),
        )
        inputs = [states.requires_grad_(), (head / 8).requires_grad_()]
        weights = torch.full((tokens,), 1 / tokens, device=device)
        weighted_loss(*inputs, weights, targets, objective, vocab_size=vocab).total.backward()
        return [t.grad.double().cpu() for t in inputs]

    for found, exact in zip(gradients("cuda", torch.bfloat16), gradients("cpu", torch.float32), strict=True):
        assert (found - exact).norm() < 0.01 * exact.norm()
