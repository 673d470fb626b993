"""Tests of the real registry of capabilities, which needs torch."""

from verified import capabilities


def test_every_capability_can_be_probed_here() -> None:
    """No probe of the real registry raises, on this machine at least."""
    found = capabilities.probe(
        capabilities.CAPABILITIES, set(capabilities.CAPABILITIES)
    )

    assert {name: said for name, said in found.items() if isinstance(said, str)} == {}


def test_a_reason_names_each_need_once() -> None:
    """What a capability implies need not be said."""
    reason = capabilities.reason
    registry = capabilities.CAPABILITIES

    assert reason(registry, ["cuda"]) == "needs an NVIDIA GPU"
    assert reason(registry, ["cuda", "bitsandbytes"]) == (
        "needs an NVIDIA GPU and bitsandbytes"
    )
    assert reason(registry, ["cuda", "bf16-gpu", "sm90"]) == (
        "needs a Hopper GPU or newer (compute capability 9.0)"
    )
    for name, capability in registry.items():
        assert name not in capability.implies
        assert set(capability.implies) <= set(registry)
        for implied in capability.implies:
            assert set(registry[implied].implies) <= set(capability.implies)
