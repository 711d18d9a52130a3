"""
Three estimators of one gradient, that of KL(π ‖ q_λ) at each state.

`protocol` says what an estimator is given and returns; `build_estimator` picks the one that the configuration names.
"""
