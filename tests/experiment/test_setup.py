"""A run says in a few lines what it is about to do."""

from checkpoints.hf.config_keys import with_fields
from experiment.schema import Config
from experiment.setup import print_summary
from model.sharding import make_mesh


def test_summary_names_parameters_and_mesh(capsys):
    config = Config()
    print_summary(config, 12_345, 6_789, make_mesh(config.mesh), trains=True)
    out = capsys.readouterr().out
    assert (
        "12,345 total, 6,789 active" in out
        and "data=8 fsdp=1" in out
        and "=1: 8 cpu devices" in out
    )
    assert "8 x 256 = 2,048 tokens a step" in out and len(out.splitlines()) == 6


def test_what_cannot_be_exported_is_said_before_it_is_trained(capsys):
    """In one line, with all the fields; a model without them can be."""
    plain = with_fields(Config().model, {"mtp_input": "normed", "mla.gate": "none"})
    for config, words in (
        (
            Config(),
            "not for Hugging Face: model.mtp_input = 'residual' (must be normed); "
            "model.mla.gate = 'element' (must be none)",
        ),
        (Config(model=plain), "launch.convert can write it for Hugging Face"),
    ):
        print_summary(config, 2, 1, make_mesh(config.mesh), trains=True)
        assert f"export      {words}\n" in capsys.readouterr().out
