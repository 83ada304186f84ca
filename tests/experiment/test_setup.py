"""A run says in a few lines what it is about to do."""

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
    assert "8 x 256 = 2,048 tokens a step" in out and len(out.splitlines()) == 5
