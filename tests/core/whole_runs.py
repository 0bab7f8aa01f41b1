"""A model that cannot resume, for comparison with one that can."""

from typing import Any

import equinox as eqx


class WithoutResume(eqx.Module):
    """A model that hides that it can resume: every cell is a run from the tokens to the output."""

    model: Any

    @property
    def site_table(self):
        return self.model.site_table

    def __call__(self, *inputs, **options):
        return self.model(*inputs, **options)
