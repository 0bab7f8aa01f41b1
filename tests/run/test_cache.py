"""The compilation cache: its folder, and that what was compiled once is loaded the next time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mi_jax.run import enable_compilation_cache


@pytest.fixture(autouse=True)
def restore_settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    # jax opens its cache once; these let each test, and those after it, open their own.
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_default_is_a_folder_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    folder = enable_compilation_cache()
    assert folder == tmp_path / "mi_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o077 == 0


def test_a_folder_that_jax_was_given_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert enable_compilation_cache() == tmp_path / "mine"


def test_a_folder_that_cannot_be_made_warns_and_goes_without(tmp_path):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    with pytest.warns(UserWarning, match="cannot be written"):
        assert enable_compilation_cache(tmp_path / "file" / "xla") is None
    assert jax.config.jax_compilation_cache_dir == before


def test_what_was_compiled_once_is_loaded_the_next_time(tmp_path):
    hits = []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    enable_compilation_cache(tmp_path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    f = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((4, 4))
    jax.monitoring.register_event_listener(listen)
    try:
        first = f(x)
        assert not hits
        assert any(tmp_path.iterdir())
        # What a new process has: nothing in memory.
        jax.clear_caches()
        second = f(x)
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert hits
    np.testing.assert_array_equal(first, second)
