"""The optimiser against torch's own."""

import torch
from torch import nn

from training.adam import Adam


def test_every_step_is_that_of_torchs_adam_to_the_bit_also_after_a_restore() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(37, 11), nn.Linear(37, 11)
    theirs.load_state_dict(ours.state_dict())
    adam, reference = Adam(ours.parameters(), 1e-2), torch.optim.Adam(theirs.parameters(), 1e-2, fused=True)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(each, 1e-2, total_steps=40) for each in (adam, reference)]
    for step in range(40):
        if step == 20:
            state, adam = adam.state_dict(), Adam(ours.parameters(), 1.0)
            adam.load_state_dict(state)
            schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-2, total_steps=40)
            schedule.load_state_dict(schedules[0].state_dict())
            adam.load_state_dict(state)
            schedules[0] = schedule
        x = torch.randn(5, 37)
        for model, optimiser in ((ours, adam), (theirs, reference)):
            optimiser.zero_grad()
            model(x).square().sum().backward()
            optimiser.step()
        for each in schedules:
            each.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)), step


def test_a_parameter_without_a_gradient_stays_and_keeps_no_state() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    adam = Adam([used, unused], 0.1)
    for _ in range(3):
        adam.zero_grad()
        used.square().sum().backward()
        adam.step()
    torch.testing.assert_close(unused.data, torch.ones(2))
    assert (used < 0.8).all()
    unused.sum().backward()  # it joins later, and starts with a state of its own
    adam.step()
    torch.testing.assert_close(unused.data, torch.full((2,), 0.9))
