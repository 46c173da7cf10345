"""Reading a policy from a TOML file: what it means, and the message for every kind of mistake."""

from datetime import date, time
from pathlib import Path

import pytest

from models.policy_rules import AlarmRule, FeatureRule, Policy, Silence
from training.data.policy_file import read_policy
from training.errors import DataError

NAMES, UNITS = ["cpu", "latency", "errors"], ["%", "ms", None]


def read(folder: Path, text: str) -> Policy:
    path = folder / "policy.toml"
    path.write_text(text)
    return read_policy(path, NAMES, UNITS)


def test_policy_with_every_rule_is_read(tmp_path: Path) -> None:
    text = """
    [features.cpu]
    direction = "high"
    minimum = 0
    maximum = 100
    [features.latency]
    least = "5 ms"
    [features.errors]
    alone = false
    [[silences]]
    name = "backup"
    zone = "Europe/Berlin"
    days = ["sat", "sun"]
    start = "23:30"
    end = 04:00:00
    groups = ["db-*"]
    [[silences]]
    first = 2026-12-24
    last = 2026-12-26
    [alarms]
    per_day = 2
    rows = 3
    seconds = 60
    """
    assert read(tmp_path, text) == Policy(
        features={
            "cpu": FeatureRule(direction="high", minimum=0.0, maximum=100.0),
            "latency": FeatureRule(least=5.0),
            "errors": FeatureRule(alone=False),
        },
        silences=[
            Silence(
                name="backup",
                zone="Europe/Berlin",
                days=["sat", "sun"],
                start=time(23, 30),
                end=time(4),
                groups=["db-*"],
            ),
            Silence(first=date(2026, 12, 24), last=date(2026, 12, 26)),
        ],
        alarms=AlarmRule(per_day=2.0, rows=3, seconds=60.0),
    )


def test_policy_in_a_manifest_is_read_back_unchanged(tmp_path: Path) -> None:
    policy = read(tmp_path, '[[silences]]\nstart = "02:00"\nfirst = 2026-12-24\n[features.cpu]\nmaximum = 1e9')
    assert Policy.model_validate_json(policy.model_dump_json()) == policy


def test_empty_file_is_a_policy_without_rules(tmp_path: Path) -> None:
    assert read(tmp_path, "") == Policy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[features.cpu\n", "is not valid TOML"),
        ("[feature.cpu]", "unknown key 'feature': did you mean 'features'?"),
        ("[features.latncy]", "unknown feature 'latncy' in features: did you mean 'latency'?"),
        ("[features.memory]", "unknown feature 'memory' in features: expected cpu, latency, errors"),
        ('[features.cpu]\ndirecton = "high"', "unknown key 'directon' in features.cpu: did you mean 'direction'?"),
        (
            '[features.cpu]\ndirection = "up"',
            "direction: input should be 'high', 'low' or 'both', got 'up'",
        ),
        ("[features.cpu]\nleast = -1", "features.cpu.least: input should be greater than or equal to 0, got -1"),
        ('[features.latency]\nleast = "5 s"', "expected a number in ms, such as 5 or \"5 ms\", got '5 s'"),
        (
            '[features.errors]\nleast = "5 %"',
            "least: expected a number, got '5 %': the feature has no unit",
        ),
        ('[features.cpu]\nleast = "much"', "expected a number in %"),
        ("[features.cpu]\nminimum = 5\nmaximum = 5", "expected minimum below maximum, got 5 and 5"),
        ("[features.cpu]\nmaximum = nan", "features.cpu.maximum: input should be a finite number"),
        ("[features]\ncpu = 5", "features.cpu: expected a table, got 5"),
        ("[silences]", "expected tables that begin with [[silences]]"),
        ('[[silences]]\nzone = "Europe/Berln"\ngroups = ["a"]', "expected the IANA name of a time zone"),
        ('[[silences]]\nzone = "../../etc/passwd"\ngroups = ["a"]', "silences.0.zone: expected the IANA name"),
        ('[[silences]]\nstart = "2 am"', "silences.0.start: expected a time of day such as 02:30, got '2 am'"),
        ('[[silences]]\nstart = "02:00"\nend = "02:00"', "start and end are both 02:00:00: expected two different"),
        ('[[silences]]\ndays = ["monday"]', "silences.0.days.0: input should be 'mon', 'tue'"),
        ("[[silences]]\nfirst = 2026-12-26\nlast = 2026-12-24", "expected first no later than last"),
        ('[[silences]]\nname = "always"', "silences.0: expected only some days, or start, end, first, last or groups"),
        (
            '[[silences]]\ndays = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]',
            "this silence always holds, so no row would ever be anomalous",
        ),
        ('[[silences]]\nstart = "00:00"', "this silence always holds"),
        ('[[silences]]\nend = "00:00"', "this silence always holds"),
        ("[alarms]\nper_day = 0", "alarms.per_day: input should be greater than 0, got 0"),
        ("[alarms]\nrows = 1.5", "alarms.rows: input should be a valid integer"),
        ("[alarms]\nperday = 2", "unknown key 'perday' in alarms: did you mean 'per_day'?"),
    ],
)
def test_mistake_in_a_policy_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "policy.toml"))
    assert message in str(error.value)


def test_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the policy .*: No such file"):
        read_policy(tmp_path / "policy.toml", NAMES, UNITS)
    with pytest.raises(DataError, match="more than 1,048,576 bytes"):
        read(tmp_path, "#" * (2**20 + 1))
