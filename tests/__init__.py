"""Tests: facts about Orograph, each against a closed form, a dense matrix, a defining identity or another library."""
