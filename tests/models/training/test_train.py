"""Training against a closed form; resumed, sharded and accumulated runs against whole, single and large ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from mi_jax.core import sharding
from mi_jax.core.errors import InputError
from mi_jax.models import DecoderConfig, init_decoder
from mi_jax.models.training import Sampled, TrainingError, next_token_loss, train
from mi_jax.models.training.loop import _steps
from mi_jax.run import Workdir

ADAM = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-2, 3, 30), weight_decay=1e-3)
DECODER = DecoderConfig(
    n_layers=1, d_model=8, n_heads=2, n_kv_heads=2, d_head=4, d_mlp=16, d_vocab=16, n_ctx=8, tied=False
)


class Linear(eqx.Module):
    weight: Array
    bias: Array
    n_calls: int = 0

    def __call__(self, x):
        return x @ self.weight + self.bias


@pytest.fixture(scope="module")
def rows():
    k_x, k_w, k_noise = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(k_x, (64, 4)) + 0.5
    noise = 0.3 * jax.random.normal(k_noise, (64,))
    return {"x": x, "y": x @ jax.random.normal(k_w, (4,)) + 2.0 + noise}


@pytest.fixture
def linear():
    return Linear(jnp.zeros(4), jnp.zeros(()))


def squared(model, batch):
    residual = model(batch["x"]) - batch["y"]
    return jnp.mean(residual**2), {"largest": jnp.abs(residual).max()}


def language_loss(model, batch):
    return next_token_loss(model(batch["tokens"], batch["mask"]), batch["tokens"], batch["mask"])


@pytest.fixture(scope="module")
def text():
    k_tokens, k_length = jax.random.split(jax.random.key(4))
    tokens = jax.random.randint(k_tokens, (32, 8), 0, 16, jnp.int32)
    return {"tokens": tokens, "mask": jnp.arange(8)[None, :] < jax.random.randint(k_length, (32, 1), 2, 9)}


class WholeData(eqx.Module):
    data: dict[str, Array]

    def __call__(self, step):
        return self.data


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, *(eqx.filter(tree, eqx.is_array) for tree in (a, b)))


def test_reaches_the_least_squares_solution(rows, linear):
    trained = train(linear, squared, WholeData(rows), optimizer=optax.sgd(0.2), steps=300)
    design = np.c_[np.asarray(rows["x"], np.float64), np.ones(64)]
    solution, residual, *_ = np.linalg.lstsq(design, np.asarray(rows["y"], np.float64))
    np.testing.assert_allclose([*trained.model.weight, trained.model.bias], solution, atol=1e-5)
    assert trained.losses[-1] == pytest.approx(residual[0] / 64, rel=1e-5)
    # before any update the residual is the target itself
    assert trained.losses[0] == pytest.approx(float((rows["y"] ** 2).mean()), rel=1e-6)
    assert trained.metrics["largest"][0] == pytest.approx(float(jnp.abs(rows["y"]).max()), rel=1e-6)
    assert trained.losses.shape == trained.metrics["largest"].shape == (300,)
    assert trained.model.n_calls == 0
    # the model that was given is as it was
    assert not linear.weight.any()


def test_weight_decay_is_ridge_regression(rows, linear):
    decay = 0.1
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.2))
    trained = train(linear, squared, WholeData(rows), optimizer=optimizer, steps=300)
    design = np.c_[np.asarray(rows["x"], np.float64), np.ones(64)]
    # the gradient of the mean square is 2/n Xᵀ(Xw − y)
    ridge = np.linalg.solve(design.T @ design * 2 / 64 + decay * np.eye(5), design.T @ rows["y"] * 2 / 64)
    np.testing.assert_allclose([*trained.model.weight, trained.model.bias], ridge, atol=1e-5)


def test_the_length_of_calls_changes_nothing_and_compiles_once(rows, linear):
    batches = Sampled(rows, 8, key=jax.random.key(1))
    before = _steps._cached._cache_size()
    whole = train(linear, squared, batches, optimizer=ADAM, steps=30, steps_per_call=8)
    again = train(linear, squared, batches, optimizer=ADAM, steps=30, steps_per_call=8, checkpoint_every=7)
    assert _steps._cached._cache_size() == before + 1
    same(whole.model, again.model)
    np.testing.assert_array_equal(whole.losses, again.losses)


class Killed(Exception):
    pass


def not_called(step):
    raise AssertionError


def test_a_killed_run_resumes_to_the_same_numbers(rows, linear, tmp_path):
    batches = Sampled(rows, 8, key=jax.random.key(1))
    options = {"optimizer": ADAM, "steps": 30, "steps_per_call": 8, "checkpoint_every": 10}
    whole = train(linear, squared, batches, **options)
    ends = []

    def kill(fraction, note=""):
        ends.append(round(fraction * 30))
        if fraction > 0.8:
            raise Killed

    workdir = Workdir.open(tmp_path / "run", DECODER)
    with pytest.raises(Killed):
        train(linear, squared, batches, workdir=workdir, progress=kill, **options)
    assert ends == [8, 10, 18, 20, 28]
    ends.clear()
    workdir = Workdir.open(tmp_path / "run", DECODER)
    resumed = train(
        linear, squared, batches, workdir=workdir, progress=lambda f, _: ends.append(round(f * 30)), **options
    )
    assert ends == [28, 30]
    same(resumed.model, whole.model)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    np.testing.assert_array_equal(resumed.metrics["largest"], whole.metrics["largest"])
    logged = [(line["step"], line["training.loss"]) for line in workdir.metrics()]
    assert [step for step, _ in logged] == [8, 10, 18, 20, 28, 28, 30]
    assert logged[1][1] == pytest.approx(float(whole.losses[8:10].mean()))

    # a run that is done trains no more
    done = train(linear, squared, not_called, workdir=workdir, **options)
    same(done.model, whole.model)
    np.testing.assert_array_equal(done.losses, whole.losses)


def test_checkpoints_of_other_runs_are_refused(rows, linear, tmp_path):
    workdir = Workdir.open(tmp_path / "run", DECODER)
    options = {"optimizer": optax.adam(1e-2), "workdir": workdir}
    train(linear, squared, WholeData(rows), steps=3, **options)
    with pytest.raises(InputError, match="at step 3, 2 steps were asked for"):
        train(linear, squared, WholeData(rows), steps=2, **options)
    wider = Linear(jnp.zeros(5), jnp.zeros(()))
    with pytest.raises(InputError, match=r"'state\..*weight' is float32\[4\] there, and float32\[5\] here"):
        train(wider, squared, WholeData(rows), steps=4, **options)
    # what it keeps is among what adam keeps
    for optimizer in (optax.lion(1e-2), optax.sgd(1e-2)):
        with pytest.raises(InputError, match=r"of another model or optimizer: .* there, and absent here"):
            train(linear, squared, WholeData(rows), steps=4, **options | {"optimizer": optimizer})


def test_an_optimizer_that_draws_noise_resumes_too(rows, linear, tmp_path):
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(5)), optax.sgd(1e-2))
    whole = train(linear, squared, WholeData(rows), optimizer=noisy, steps=6)
    quiet = train(linear, squared, WholeData(rows), optimizer=optax.sgd(1e-2), steps=6)
    assert np.abs(whole.losses - quiet.losses).max() > 1e-4
    workdir = Workdir.open(tmp_path / "run", DECODER)
    for steps in (3, 6):
        resumed = train(linear, squared, WholeData(rows), optimizer=noisy, steps=steps, workdir=workdir)
    np.testing.assert_array_equal(resumed.losses, whole.losses)


def test_gradients_accumulated_over_batches_are_those_of_all_of_them(rows, linear):
    class Parts(eqx.Module):
        data: dict[str, Array]

        def __call__(self, step):
            start = step % 4 * 16
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, 16), self.data)

    parts = optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation()
    accumulated = train(linear, squared, Parts(rows), optimizer=parts, steps=20)
    large = train(linear, squared, WholeData(rows), optimizer=optax.adam(0.1), steps=5)
    np.testing.assert_allclose(accumulated.model.weight, large.model.weight, atol=1e-5)
    np.testing.assert_allclose(accumulated.losses[:4].mean(), large.losses[0], rtol=1e-5)


@pytest.fixture(scope="module")
def one_device(text):
    model = init_decoder(DECODER, key=jax.random.key(0))
    return model, train(model, language_loss, Sampled(text, 16, key=jax.random.key(1)), optimizer=ADAM, steps=5)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)])
def test_eight_devices_equal_one(text, one_device, sizes):
    model, one = one_device
    mesh = sharding.make_mesh(*sizes)
    batches = Sampled(text, 16, key=jax.random.key(1))
    seen = []

    def where(fraction, note=""):
        seen.append(note)

    many = train(model, language_loss, batches, optimizer=ADAM, steps=5, steps_per_call=3, mesh=mesh, progress=where)
    assert [note[:11] for note in seen] == ["step 3 of 5", "step 5 of 5"]
    np.testing.assert_allclose(many.losses, one.losses, atol=1e-5)
    for a, b in zip(jax.tree.leaves(one.model), jax.tree.leaves(many.model), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert len(many.model.embed.sharding.device_set) == 8
    assert many.model.embed.sharding.is_fully_replicated == (sizes == (8, 1, 1))


def test_moments_lie_where_their_parameters_do_and_a_resumed_run_stays_sharded(text, one_device, tmp_path):
    model, one = one_device
    mesh, batches = sharding.make_mesh(2, 2, 2), Sampled(text, 16, key=jax.random.key(1))
    workdir = Workdir.open(tmp_path / "run", DECODER)
    options = {"optimizer": ADAM, "mesh": mesh, "workdir": workdir}
    before = _steps._cached._cache_size()
    for steps in (3, 5):
        many = train(model, language_loss, batches, steps=steps, **options)
    assert _steps._cached._cache_size() <= before + 1
    np.testing.assert_allclose(many.losses, one.losses, atol=1e-5)
    # vocabulary over "model", d_model over "fsdp": a quarter on every device
    assert many.model.unembed.sharding.shard_shape((16, 8)) == (8, 4)


def test_models_without_named_axes_are_whole_on_every_device(rows, linear):
    mesh = sharding.make_mesh(data=4)
    batches = Sampled(rows, 8, key=jax.random.key(1))
    many, one = (train(linear, squared, batches, optimizer=ADAM, steps=5, mesh=m) for m in (mesh, None))
    assert many.model.weight.sharding.is_fully_replicated
    np.testing.assert_allclose(many.losses, one.losses, atol=1e-5)
    named = Linear(("d_model",), ())
    model = Linear(jnp.zeros(4), jnp.zeros(()))
    mesh = sharding.make_mesh(data=2, fsdp=2)
    sharded = train(model, squared, batches, optimizer=ADAM, steps=5, mesh=mesh, axes=eqx.filter(named, named_axes))
    assert sharded.model.weight.sharding.shard_shape((4,)) == (2,)
    np.testing.assert_allclose(sharded.losses, one.losses, atol=1e-5)


def named_axes(x):
    return isinstance(x, str)


def test_a_loss_that_becomes_nan_is_named_and_not_saved(rows, linear, tmp_path):
    def diverging(model, batch):
        return squared(model, batch)[0] + jnp.where(model.n_steps > 6, jnp.nan, 0.0)

    class Counting(Linear):
        n_steps: Array = eqx.field(default_factory=lambda: jnp.zeros(()))

    # its parameter n_steps grows by 1 in every step
    counting = Counting(jnp.zeros(4), jnp.zeros(()))

    def loss(model, batch):
        return diverging(jax.lax.stop_gradient(model), batch) - model.n_steps

    workdir = Workdir.open(tmp_path / "run", DECODER)
    options = {"optimizer": optax.sgd(1.0), "steps": 20, "steps_per_call": 10, "checkpoint_every": 5}
    with pytest.raises(TrainingError, match=r"the loss is nan at step 7 of 20, after a loss of .*learning rate"):
        train(counting, loss, WholeData(rows), workdir=workdir, **options)
    arrays = workdir.load_arrays("training")
    assert arrays["state.step"] == 5
    assert all(np.isfinite(x).all() for x in arrays.values())


def test_a_model_that_is_nan_from_the_start(rows):
    broken = Linear(jnp.full(4, jnp.nan), jnp.zeros(()))
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0 of 5\. Lower"):
        train(broken, squared, WholeData(rows), optimizer=ADAM, steps=5)


def test_parameters_that_the_last_update_makes_infinite(rows, linear):
    with pytest.raises(TrainingError, match="a parameter is not finite at step 1 of 1, after a loss of"):
        train(linear, squared, WholeData(rows), optimizer=optax.sgd(3e38), steps=1)


def test_counts_that_are_not_positive(rows, linear):
    for name in ("steps", "steps_per_call", "checkpoint_every"):
        options = {"steps": 1} | {name: 0}
        with pytest.raises(InputError, match=f"^{name} must be at least 1, got 0"):
            train(linear, squared, WholeData(rows), optimizer=ADAM, **options)


def test_a_decoder_learns_a_sequence():
    """Cyclic tokens are learnt to near certainty; a loss of ln 16 is chance."""
    cycle = (jnp.arange(8)[None, :] * 3 + jnp.arange(16)[:, None]).astype(jnp.int32) % 16
    data = {"tokens": cycle, "mask": jnp.ones(cycle.shape, bool)}
    model = init_decoder(DECODER, key=jax.random.key(0))
    trained = train(model, language_loss, WholeData(data), optimizer=optax.adam(3e-2), steps=80)
    assert trained.losses[0] > np.log(16)
    assert trained.losses[-1] < 0.05
