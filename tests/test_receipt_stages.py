"""Gates in a receipt: a line and a column per stage, nothing for methods without stages."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_prune._receipt_stages import bars, stage_rows, stages_of
from lightning_prune.receipt import Receipt

STAGES: list[dict[str, Any]] = [
    {"stage": 0, "soft_share": 0.9, "hard_share": 0.5, "soft_loss": 0.3, "hard_loss": 2.0, "histogram": [0, 0, 8, 0]},
    {"stage": 1, "soft_share": 0.52, "hard_share": 0.5, "histogram": [5, 1, 0, 2]},
]


def receipt(certificate: Any) -> Receipt:
    return Receipt(method="chipnet", certificate=certificate, layers=[])


def test_the_tallest_bin_is_full_and_no_gate_is_lost() -> None:
    assert bars([0, 1, 4, 8, 100]) == "·▁▁▁█"
    assert bars([0, 0]) == "··"


def test_every_stage_has_a_row_and_what_was_not_measured_stays_empty() -> None:
    assert stage_rows(receipt({"stages": STAGES})) == [
        ("0", "0.9000", "0.5000", "0.3000", "2.0000", "··█·"),
        ("1", "0.5200", "0.5000", "", "", "█▂·▄"),
    ]


def test_the_markdown_shows_the_stages() -> None:
    text = receipt({"stages": STAGES}).to_markdown()
    assert "## Gates" in text
    assert "| 1 | 0.5200 | 0.5000 |  |  | █▂·▄ |" in text


@pytest.mark.parametrize(
    "certificate", [None, {}, {"claim": "x"}, {"stages": []}, {"stages": "x"}, {"stages": [{"stage": 1}]}]
)
def test_other_certificates_have_no_stages(certificate: Any) -> None:
    assert stages_of(receipt(certificate)) == []
    assert "## Gates" not in receipt(certificate).to_markdown()


def test_the_picture_grows_by_the_stages() -> None:
    pytest.importorskip("matplotlib")
    from lightning_prune._receipt_views import png

    plain, staged = png(receipt(None)), png(receipt({"stages": STAGES}))
    assert plain is not None
    assert staged is not None
    assert int.from_bytes(staged[20:24], "big") > int.from_bytes(plain[20:24], "big")  # height in the PNG's header
