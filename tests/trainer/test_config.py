"""Recipes as data: defaults, overrides, and every rule that a recipe can break."""

from pathlib import Path

import pytest

from darht.cache.builder.config import ViewConfig
from darht.core.config import parse, to_plain
from darht.core.errors import ConfigError
from darht.trainer.config import (
    InnerConfig,
    OptimConfig,
    StudentConfig,
    TrainConfig,
    WarmConfig,
    load_recipe,
)
from darht.trainer.student.losses import RECIPES, Ard, Darht, Kd, Mtard, Rslad, Trades
from darht.trainer.teacher.config import TeachConfig


def test_no_file_and_no_assignments_give_the_defaults():
    assert load_recipe(None, ()) == TrainConfig()


def test_defaults_are_those_of_the_released_code():
    config = TrainConfig()
    assert config.objective() == Darht(phases=(50 / 350, 118 / 350), kd="kl", weights="batch", clean_share=0.5)
    assert (config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (0.1, 0.9, 5e-4)
    assert (config.inner.eps, config.inner.length, config.inner.steps) == (8.0, 2.0, 10)
    assert (config.teachers, config.targets) == ("cached", None)
    assert Rslad().clean_weight == 1 / 6
    assert (Ard().tau, Ard().alpha, Mtard().rate, Kd().tau) == (30, 1, 0.025, 4)
    assert (WarmConfig().start, WarmConfig().momentum, WarmConfig().consistency) == ("cached", 0.3, 10)
    assert TeachConfig(algorithm="trades").recipe(StudentConfig()).objective() == Trades(beta=6.0)
    assert (TeachConfig().inner, TeachConfig().views) == (InnerConfig(), ViewConfig(padding=4, flip=True))


def test_a_file_is_read_and_assignments_change_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("recipe: rslad\noptim: {epochs: 3, weight_decay: 5e-4}\nstudent: {kwargs: {width: 8}}\n")
    config = load_recipe(path, ("optim.epochs=7", "student.kwargs.blocks=[1, 1]", "loss.clean_weight=0.5"))
    assert config.recipe == "rslad"
    assert config.optim == OptimConfig(epochs=7, weight_decay=5e-4)
    assert config.student.kwargs == {"width": 8, "blocks": [1, 1]}
    assert config.objective() == Rslad(clean_weight=0.5)


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(recipe="at", optim=OptimConfig(clip_norm=1.0))])
def test_plain_form_parses_back_to_the_same_recipe(config):
    assert parse(TrainConfig, to_plain(config), "recipe") == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.epoch=3", "recipe.optim: unknown key 'epoch'; did you mean 'epochs'?"),
        ("recpie=at", "recipe: unknown key 'recpie'; did you mean 'recipe'?"),
        ("recipe=sard", "recipe must be one of darht, rslad, ard, mtard, adaad, saad, kd, at, trades, adr; got 'sard'"),
        ("inner.kind=hot", "recipe.inner.kind must be one of cached, warm, n-fgsm, pgd, fat; got 'hot'"),
        ("inner.warm.start=hot", "recipe.inner.warm.start must be one of cached, zero, noise, label; got 'hot'"),
        ("inner.warm.momentum=0.2", "inner.warm sets up inner.kind: warm; got pgd"),
        ("inner.warm.momentum=1", "momentum must lie in [0, 0.5]; got 1"),
        ("inner.warm.consistency=-1", "consistency and check_rows must be at least 0; got -1 and 512"),
        ("inner.warm.check_rows=-1", "consistency and check_rows must be at least 0; got 10 and -1"),
        ("teachers=dead", "recipe.teachers must be one of cached, live; got 'dead'"),
        ("targets=second-order", "recipe.targets must be one of clean, nearest, first-order; got 'second-order'"),
        ("inner.eps=0.03", "eps is in whole pixel levels of 255; got 0.03, which is 7.65 levels: write eps: 8"),
        ("inner.step=0.007", "step is in whole pixel levels of 255; got 0.007, which is 1.79 levels: write step: 2"),
        ("inner.steps=0", "steps must be at least 1; got 0"),
        ("optim.epochs=0", "epochs and batch_size must be at least 1; got 0 and 256"),
        ("optim.batch_size=0", "epochs and batch_size must be at least 1; got 100 and 0"),
        ("optim.lr=0", "lr must be above 0"),
        ("optim.lr=fast", "number; got 'fast'"),
        ("optim.warmup=1", "warmup a share in [0, 1); got 0.1 and 1"),
        ("optim.momentum=1", "momentum must lie in [0, 1); got 1"),
        ("optim.weight_decay=-1", "weight_decay must be at least 0; got -1"),
        ("optim.clip_norm=0", "clip_norm must be above 0, or null for no limit; got 0"),
        ("optim.milestones=[75, 90]", "milestones are shares of the run in [0, 1]; got [75.0, 90.0]"),
        ("loss.clean_share=2", "loss of recipe darht: clean_share must be a number in [0, 1]; got 2"),
        ("loss.clean_by=image", "loss of recipe darht.clean_by must be one of batch, row; got 'image'"),
        ("loss.phases=[0.5, 0.2]", "phases are two rising shares in [0, 1]; got [0.5, 0.2]"),
        ("loss.phase=[0, 1]", "loss of recipe darht: unknown key 'phase'; did you mean 'phases'?"),
        ("loss.tau=4", "loss of recipe darht: unknown key 'tau'; known keys are awp, smoothing, phases, kd, weights"),
        ("student.feature_map=false", "recipe darht trains the feature map; set student.feature_map: true"),
        ("student.mc_samples=4", "mc_samples are passes of mc_dropout, which is 0; got 4: set mc_dropout too"),
        ("optim.epochs", "an assignment reads key=value; got 'optim.epochs'"),
    ],
)
def test_a_broken_rule_names_the_rule_and_the_value(assignment, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, (assignment,))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ("inner.kind=warm", "inner.eps=128"),
            "inner: warm remembers perturbations of at most 127 levels; got eps 128",
        ),
        (
            ("recipe=mtard", "compute.accumulate=2"),
            "mtard learns its weights from whole batches, compute.accumulate is 2",
        ),
        (("recipe=mtard", "loss.milestones=[9, -4]"), "milestones must be a number in [0, 1]; got 9"),
    ],
)
def test_settings_that_do_not_go_together(assignments, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, assignments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("inner.kind=cached", "targets=clean"), "inner.kind: cached"),
        (("teachers=live", "targets=first-order"), "teachers: live"),
        (("recipe=rslad", "targets=nearest"), "recipe: rslad"),
        (("recipe=at", "targets=clean"), "recipe: at"),
    ],
)
def test_targets_are_for_recipes_that_ask_about_the_student_s_own_examples(assignments, message):
    with pytest.raises(ConfigError, match=r"stands for what teachers would say about the student's own") as caught:
        load_recipe(None, assignments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("inner.kind=cached",), "got cached and darht"),
        (("recipe=at",), "got pgd and at"),
        (("recipe=trades", "inner.kind=warm"), "got warm and trades"),
    ],
)
def test_live_teachers_must_have_something_to_say(assignments, message):
    with pytest.raises(ConfigError, match="teachers: live are asked about the student's own examples") as caught:
        load_recipe(None, ("teachers=live", *assignments))
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["cached", "warm"])
def test_kd_has_no_adversarial_examples(kind):
    with pytest.raises(ConfigError, match=f"recipe kd trains on clean images alone; leave inner.kind: {kind} out"):
        load_recipe(None, ("recipe=kd", f"inner.kind={kind}"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_of_a_recipe_are_its_own(recipe):
    assert load_recipe(None, (f"recipe={recipe}",)).objective() == RECIPES[recipe]()
    with pytest.raises(ConfigError, match=f"loss of recipe {recipe}: unknown key 'gamma'"):
        load_recipe(None, (f"recipe={recipe}", "loss.gamma=1"))


def test_the_step_of_each_inner_mode():
    assert InnerConfig(eps=8).length == 2
    assert InnerConfig(eps=2).length == 1  # a quarter would be less than a level
    assert InnerConfig(eps=8, kind="warm").length == 8  # FGSM's, through the whole ball
    assert InnerConfig(eps=8, kind="warm", step=5).length == 5
    warm = InnerConfig(eps=8, kind="warm", step=5).pgd()
    assert (warm.eps, warm.step, warm.steps) == (8, 2, 10)  # what the student is scored with
    short = InnerConfig(eps=8).pgd(2)
    assert (short.step, short.steps) == (5, 2)
    assert short.step * short.steps >= short.eps


def test_nesterov_needs_momentum():
    with pytest.raises(ConfigError, match="nesterov needs a momentum above 0"):
        OptimConfig(nesterov=True, momentum=0.0)
    assert OptimConfig(nesterov=True).nesterov


def test_all_mistakes_are_reported_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("sed: 1\nteachers: dead\noptim: {epochs: 0}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, ())
    for part in (
        "did you mean 'seed'?",
        "teachers must be one of cached, live",
        "epochs and batch_size must be at least 1",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ({"algorithm": "fat"}, "algorithm fat has inner.kind: fat; got pgd"),
        ({"algorithm": "trades", "loss": {"beta": -6.0}}, "beta must be a number of at least 0; got -6"),
        ({"loss": {"beta": 6.0}}, "loss of recipe at: unknown key 'beta'"),
        ({"holdout": -0.1}, r"holdout is a share in \[0, 1\); got -0.1"),
        ({"seed": -1}, "seed must be at least 0; got -1: write 1"),
    ],
)
def test_a_teacher_s_broken_rules(assignments, message):
    with pytest.raises(ConfigError, match=message):
        TeachConfig(**assignments)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "darht"])
def test_only_darht_needs_the_feature_map(recipe):
    assert TrainConfig(recipe=recipe, student=StudentConfig(feature_map=False)).student.feature_map is False


def test_the_attack_inside_carries_the_settings():
    attack = InnerConfig(eps=4, step=1, steps=3).pgd()
    assert (attack.eps, attack.step, attack.steps, attack.norm) == (4, 1, 3, "linf")
    assert InnerConfig(kind="fat", eps=4, step=1, steps=3).pgd() == attack


def test_seeds_are_not_negative():
    with pytest.raises(ConfigError, match="seed must be at least 0; got -7: write 7"):
        TrainConfig(seed=-7)


def test_a_batch_is_no_larger_than_what_is_trained_on():
    OptimConfig(batch_size=40).check_rows(40)
    with pytest.raises(ConfigError, match=r"got 41 for 40 rows: set optim.batch_size to 40 or less"):
        OptimConfig(batch_size=41).check_rows(40)


def test_a_recipe_and_its_assignments_may_write_a_share_of_255(tmp_path):
    (tmp_path / "r.yaml").write_text("inner: {eps: 4/255, step: 1/255}\n")
    assert load_recipe(tmp_path / "r.yaml", ()).inner.pgd() == InnerConfig(eps=4, step=1).pgd()
    assert load_recipe(tmp_path / "r.yaml", ("inner.eps=16/255",)).inner.eps == 16
    with pytest.raises(ConfigError, match=r"recipe.optim.lr must be a finite number; got '8/255'"):
        load_recipe(None, ("optim.lr=8/255",))


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("loss=null", lambda config: config.loss == {}),
        ("loss.phases=null", lambda config: config.objective().phases == (50 / 350, 118 / 350)),
        ("inner=null", lambda config: config.inner == InnerConfig()),
        ("inner.eps=null", lambda config: config.inner.eps == 8),
        ("optim.milestones=null", lambda config: config.optim.milestones == (0.75, 0.9)),
        ("optim.clip_norm=null", lambda config: config.optim.clip_norm is None),
        ("seed=null", lambda config: config.seed == 0),
        ("student.kwargs=null", lambda config: config.student.kwargs == {}),
        ("student.kwargs.width=null", lambda config: config.student.kwargs == {"width": None}),
    ],
)
def test_null_puts_the_default_back(assignment, read, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "{loss: {phases: [0.1, 0.2]}, inner: {eps: 4}, seed: 3, student: {kwargs: {width: 8}},"
        " optim: {milestones: [0.5], clip_norm: 1}}"
    )
    assert read(load_recipe(path, (assignment,)))
    assert load_recipe(path, ("inner=null", "inner.steps=3")).inner == InnerConfig(steps=3)


@pytest.mark.parametrize("assignment", ["losss=null", "loss.phasess=null", "optim.rate=null"])
def test_null_for_a_key_that_is_not_there_is_refused(assignment):
    with pytest.raises(ConfigError, match="unknown key"):
        load_recipe(None, (assignment,))


def test_a_recipe_of_ours_goes_by_its_name():
    assert load_recipe(Path("darht-warm"), ()).inner.kind == "warm"
