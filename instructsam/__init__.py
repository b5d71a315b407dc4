"""InstructSAM: segment every instance that a free-form instruction asks for, in one pass."""
