"""Operations with a plain-torch definition: `reference` says what is computed, faster twins compute the same."""
