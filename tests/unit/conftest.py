"""Fixtures for tests of core modules."""

from tests.support.unions import home as home
from tests.support.unions import unions as unions
from tests.support.unions import userxattr as userxattr
