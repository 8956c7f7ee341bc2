"""What jaxtyping's import hook decorates every function with while the tests run: beartype, for which an int is a float."""

from beartype import BeartypeConf, beartype

enforced = beartype(conf=BeartypeConf(is_pep484_tower=True))
