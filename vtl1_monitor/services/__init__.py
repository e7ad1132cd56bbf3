"""Services of the policy personality: generators that yield what they ask the VMM for and return the result."""
