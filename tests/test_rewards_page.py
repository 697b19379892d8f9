"""assets/rewards.md is what flow_grpo/rewards/registry.py says, and the seconds that are kept."""

from flow_grpo.rewards.registry import REWARDS
from scripts.docs.rewards import PAGE, TIMED, text


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == text(), "run python scripts/docs/rewards.py"


def test_every_reward_is_on_it_and_no_cell_is_longer_than_a_line():
    page = text()
    assert set(TIMED) < set(REWARDS)
    for name in REWARDS:
        assert page.count(f"| `{name}` |") == 2
    assert max(len(cell) for line in page.splitlines() if line.startswith("|") for cell in line.split("|")) < 60
