"""The plain step is a step of torch's own: the oracle is the loop that everybody writes."""

from __future__ import annotations

import torch
from torch import nn

from gradctl.subject.subject import Subject
from gradctl.training.optimizers import optimizer_choice
from gradctl.training.plain_runs import PlainRuns
from gradctl.training.recipe import TrainingRecipe


def mean_square(outputs):
    return outputs.square().mean()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def runs_of(model, *args, steps=3, optimizer="adamw", loss=mean_square):
    subject = Subject(target="test", model=model, args=args, loss=loss)
    return PlainRuns(TrainingRecipe(subject, optimizer_choice(optimizer)), steps)


def test_three_plain_steps_are_those_of_torch():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    runs = runs_of(net(), x)
    steps = runs.run("native")
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number, step in enumerate(steps):
        batch = x if number == 0 else runs.recipe.subject_of(number).args[0]
        optimizer.zero_grad()
        loss = mean_square(model(batch))
        loss.backward()
        gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
        optimizer.step()
        outcome = step.record.outcome
        assert torch.equal(outcome.outputs["loss"], loss)
        for name, each in model.named_parameters():
            assert torch.equal(outcome.gradients[f"param:{name}"], gradients[name])
            assert torch.equal(outcome.state[f"param:{name}"], each)
            assert torch.equal(outcome.state[f"optimizer:exp_avg.{name}"], optimizer.state[each]["exp_avg"])
        for name, each in model.named_buffers():
            assert torch.equal(outcome.state[f"buffer:{name}"], each)


def test_the_users_model_and_its_gradients_stay_as_they_were():
    model = net()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    model[0].weight.grad = torch.ones_like(model[0].weight)
    runs_of(model, torch.ones(5, 3)).run("native")
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))


def test_a_drawn_batch_without_a_finite_loss_is_replaced_by_the_example():
    runs = runs_of(nn.Linear(3, 3), torch.ones(4, 3), loss=lambda outputs: outputs.mean(), steps=2)
    runs.recipe._drawn[1] = Subject(
        target="test", model=runs.recipe.subject.model, args=(torch.full((4, 3), torch.inf),)
    )
    steps = runs.run("native")
    assert (len(steps), runs.recipe.on_example) == (2, {1})
