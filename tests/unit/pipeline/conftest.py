"""No deadlines for hypothesis: on a shared machine the time of one example says nothing."""

from hypothesis import settings

settings.register_profile("ckptsvc", deadline=None)
settings.load_profile("ckptsvc")
