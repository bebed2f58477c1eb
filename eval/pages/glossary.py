"""Glossary of the report (section -> entry -> explanation), shown on the report and comparison pages and in docs/report.md."""

PROVENANCE = "Dictionary and data"
# A latent firing on a larger fraction of tokens is dense: it carries little information about any of them.
DENSE = 0.1
EXPLANATIONS: dict[str, dict[str, str]] = {
    PROVENANCE: {
        "report_version": "Version of this report's format. A changed definition gets a new name.",
        "checkpoint": "Where the dictionary was loaded from.",
        "kind": "What is mapped: an sae maps an activation to itself, a transcoder what a part of the model reads to what it "
        "writes. What is to be reconstructed, for an sae the activation itself, is called the target.",
        "encoder": "How latents are chosen: the variant and its arguments.",
        "d_in": "Width of the activation that is read.",
        "d_out": "Width of the activation that is written; d_in for an sae.",
        "n_latents": "How many latents (learned units) the dictionary has.",
        "selection": "How latents were chosen while judging; 'per token' is how a dictionary is used.",
        "hook": "Module path and side of the activation the dictionary was trained on; of a transcoder, of both activations.",
        "model": "The language model whose activations these are.",
        "text": "The corpus. Only documents held out from training are evaluated.",
        "training_tokens": "Tokens trained on; a token seen twice counts twice.",
        "weights_sha256": "Digest of the dictionary's file: whether these figures are those of the file that lies there now.",
        "git_commit": "Version of the code that trained the dictionary.",
        "seed": "Seed of the training: initial weights and the order of the tokens.",
        "recipe_digest": "Equal for trainings whose recipes differ in seed and directory only.",
        "documents": "Held-out documents scored. The mean and the linear error were fitted on others.",
        "tokens": "Tokens scored. Excluded positions (special tokens, the first few of a context) are not among them.",
        "tokens_asked": "Tokens asked for, half of them to be scored. Held-out text that is shorter is cut in halves.",
        "fit_tokens": "Tokens of the half that the mean and the linear error were fitted on.",
        "documents_shared": "Documents partly in one half and partly in the other: 0, unless there are too few to keep them "
        "whole.",
        "shortfalls": "What the training or this evaluation asked for and had less of: steps, tokens; each was also logged.",
        "assumed": "What the dictionary's files do not say and nobody said: taken from recipes' defaults.",
        "skipped": "Rows of text and tokens that could not be used, in training and here: left out, or mended by U+FFFD. Only "
        "where there were any.",
        "doubts": "What these figures say against the hook, the normalisation or the scale, and shortfalls of more than half; "
        "each was also logged.",
        "reasons": "Entry -> why it is null. Nothing in a report is NaN or infinite.",
    },
    "Reconstruction": {
        "fvu": "Fraction of variance unexplained, a ratio of sums: squared error of the whole set over squares about the "
        "mean of the whole set. 0 is perfect, 1 is no better than the mean. A mean of per-token ratios is another number.",
        "cosine": "Cosine between target and reconstruction, mean over tokens. 1 is perfect.",
        "l2_ratio": "Norm of the reconstruction over norm of the target, mean over tokens. Below 1 is shrinkage.",
        "relative_reconstruction_bias": "Sum of squared reconstruction norms over sum of reconstruction times target. 1 is "
        "unbiased, below 1 is shrinkage (arXiv:2404.16014, eq. 10).",
        "fvu_low": "Lower end of the interval of fvu; see interval_level.",
        "fvu_high": "Upper end of the same.",
        "mse": "Squared norm of the error, mean over tokens; in the activation's own units.",
        "mse_per_dimension": "mse / d_out.",
        "fvu_affine": "The fvu of the best affine map from what a transcoder reads to the target, fitted on other "
        "documents: the floor to beat. With few tokens for the fit (see dark_matter_enough_tokens) it comes out too high.",
    },
    "Other definitions of explained variance": {
        "ev_global": "1 - fvu. To be preferred: one mean, one ratio of sums.",
        "ev_mean_dim": "R\u00b2 of every dimension, then their unweighted mean: dimensions that hardly vary count as much "
        "as those that carry the signal, and may send it far below 0.",
        "ev_residual_variance": "1 - variance of the error / variance of the target (dictionary_learning's "
        "frac_variance_explained): blind to a constant offset of the reconstruction.",
        "ev_scalar_mean": "Squares of the target about one number, the mean over tokens and dimensions (overcomplete's "
        "r2_score): the mean direction counts as signal.",
        "ev_uncentred": "1 - squared error / squares of the target about zero: the mean counts as signal.",
        "ev_mean_token": "1 - mean over tokens of squared error / squared norm of the target (the normalised MSE of "
        "several code bases): tokens of small norm weigh most. Tokens whose target is zero are left out.",
    },
    "Tokens of high norm": {
        "high_norm_threshold": "10 times the median norm of the target on the documents of the first half (to 1 "
        "%). Above it a token is of high norm: often the first of a context, or a delimiter.",
        "high_norm_tokens": "Scored tokens of high norm.",
        "high_norm_energy_share": "Their share of the targets' summed squared norms.",
        "fvu_without_high_norm": "fvu of the other tokens, about their own mean.",
        "cosine_without_high_norm": "cosine of the other tokens.",
        "l2_ratio_without_high_norm": "l2_ratio of the other tokens.",
        "l0_mean_without_high_norm": "l0_mean of the other tokens.",
    },
    "Sparsity": {
        "l0_mean": "Latents that fire on a token, mean over tokens.",
        "l0_p10": "A tenth of the tokens have at most so many latents firing.",
        "l0_median": "Half of the tokens have at most so many latents firing.",
        "l0_p90": "Nine tenths of the tokens have at most so many latents firing.",
        "dead_fraction": "Share of latents silent on all tokens scored. A longer window finds fewer: compare equal ones only.",
        "dead_window_tokens": "That window, in tokens.",
        "dead_training_fraction": "Share of latents silent on the last tokens of the training, its batches choosing latents as "
        "they do; null where the checkpoint does not hold it. A claim about dead latents wants a window of a million tokens.",
        "dead_training_window_tokens": "That window, in tokens: dead_after_tokens of the recipe, or all of a shorter training.",
        "dense_fraction": f"Share of latents that fire on more than {DENSE:g} of the tokens.",
        "frequent_fraction": "Share of latents that fire on more than 0.01 of the tokens.",
        "effective_latents": "Exponential of the entropy of the latents' shares of all firings: so many latents that fire "
        "equally often would be as diverse.",
        "l0_histogram_counts": "Tokens with exactly 0, 1, 2, ... latents firing.",
        "l0_histogram_edges": "The numbers 0, 1, 2, ... that these counts are about, and where the last one ends.",
        "density_histogram_counts": "Latents by the decimal logarithm of their firing density; dead ones are in no bin.",
        "density_histogram_log10_edges": "Edges of these bins.",
    },
    "Intervals": {
        "interval_level": "Entries that end in _low and _high are the ends of a percentile interval of this level: "
        "scored documents are drawn anew with replacement and the figure is computed from their sums. What the first half "
        "fitted, and the dictionary, are taken as given.",
        "interval_resamples": "How often they were drawn.",
        "interval_seed": "What the draws begin with.",
    },
    "Weights": {
        "decoder_max_cosine_mean": "For every latent the largest absolute cosine between its atom and another's, mean "
        "over latents. Random directions give about sqrt(2 ln n_latents / d_out).",
        "decoder_max_cosine_median": "The median of the same.",
        "decoder_max_cosine_p90": "A tenth of the latents have an atom nearer to another than this.",
        "decoder_near_copies_fraction": "Share of latents whose atom has an absolute cosine above 0.9 with another.",
        "decoder_latents_compared": "Latents these figures are about: all, or in very wide dictionaries evenly spaced "
        "ones. Each was compared with all others.",
        "encoder_decoder_cosine_mean": "Cosine between a latent's encoder row and its atom, mean over latents; null where "
        "they are one matrix, or live in two spaces.",
        "encoder_decoder_cosine_median": "The median of the same.",
    },
    "Effect on the model": {
        "downstream_tokens": "Predictions scored: at replaced positions whose next token is of the same document. Excluded "
        "positions keep the model's own activation.",
        "ce_clean": "Cross-entropy of the untouched model, nats per token.",
        "ce_spliced": "Cross-entropy with reconstructions in place of the targets, nats per token.",
        "ce_zero": "Cross-entropy with zeros in their place, nats per token.",
        "ce_mean": "Cross-entropy with the mean target in their place, nats per token.",
        "kl_spliced": "KL divergence from the untouched model's predictions to those on reconstructions, nats per token.",
        "kl_zero": "The same KL divergence with zeros, nats per token.",
        "kl_mean": "The same KL divergence with the mean target, nats per token.",
        "ce_increase": "ce_spliced - ce_clean: what the dictionary costs the model, nats per token.",
        "top1_agreement": "Share of predictions whose likeliest token stays the same.",
        "ce_recovered_zero": "(ce_ablated - ce_spliced) / (ce_ablated - ce_clean), ablated to zero. 1 is perfect, 0 no "
        "better than zeros; undefined where the ablation costs nothing.",
        "ce_recovered_mean": "The same fraction, ablated to the mean target: the fairer yardstick.",
        "kl_recovered_zero": "(kl_zero - kl_spliced) / kl_zero.",
        "kl_recovered_mean": "(kl_mean - kl_spliced) / kl_mean.",
        "ce_resample": "Cross-entropy with the activation of some other token, of the first half of the documents, in "
        "place of each target, nats per token: an ablation that stays within the data.",
        "kl_resample": "The same KL divergence with activations of other tokens, nats per token.",
        "ce_recovered_resample": "The fraction recovered, ablated to activations of other tokens.",
        "kl_recovered_resample": "(kl_resample - kl_spliced) / kl_resample.",
        "token_ce_increase_p05": "A twentieth of the predictions get worse by less than this, in nats, or better. "
        "Quantiles of single predictions are to within 1 %, or 0.00001 nats.",
        "token_ce_increase_median": "Half of the predictions get worse by less than this, or better.",
        "token_ce_increase_p95": "A twentieth of the predictions get worse by more than this.",
        "token_ce_increase_p99": "A hundredth of the predictions get worse by more than this.",
        "token_ce_better_fraction": "Share of predictions whose own loss is lower with reconstructions than without.",
        "ce_increase_low": "Lower end of the interval of ce_increase; see interval_level.",
        "ce_increase_high": "Upper end of the same.",
        "kl_spliced_low": "Lower end of the interval of kl_spliced.",
        "kl_spliced_high": "Upper end of the same.",
        "top1_agreement_low": "Lower end of the interval of top1_agreement.",
        "top1_agreement_high": "Upper end of the same.",
        "ce_recovered_zero_low": "Lower end of the interval of ce_recovered_zero.",
        "ce_recovered_zero_high": "Upper end of the same.",
        "ce_recovered_mean_low": "Lower end of the interval of ce_recovered_mean.",
        "ce_recovered_mean_high": "Upper end of the same.",
        "ce_recovered_resample_low": "Lower end of the interval of ce_recovered_resample.",
        "ce_recovered_resample_high": "Upper end of the same.",
    },
    "Error, linear and nonlinear": {
        "fvu_total": "fvu on the tokens that score the regression: linear and nonlinear error together.",
        "fvu_nonlinear": "What is left of fvu_total once a linear map of what is read, fitted on other data, has "
        "predicted the error. Low alone is no merit, an empty dictionary has none: read it beside fvu_total.",
        "linear_error_share": "1 - fvu_nonlinear / fvu_total: share of the squared error that is linear in the activation.",
        "fvu_rescaled": "fvu_total after the best single factor on the reconstruction; what that takes off is shrinkage.",
        "best_factor": "That factor. Above 1 the dictionary shrinks.",
        "linear_error_share_rescaled": "linear_error_share after that factor: what is linear beyond shrinkage.",
        "reconstruction_variance": "Variance of the reconstruction over that of the target. 0 is a dead dictionary, "
        "whose whole error is linear by construction.",
        "err_vec_r2": "R\u00b2 of the linear prediction of the error, all dimensions together, about the error's mean.",
        "err_vec_r2_mean_dim": "R\u00b2 of the linear prediction of the error, per dimension, then averaged.",
        "err_norm_r2": "R\u00b2 of the linear prediction of the squared error norm.",
        "fvu_nonlinear_on_target": "fvu_nonlinear where the map reads the target, not what the dictionary reads: how much "
        "of the error is a linear distortion of what was to be written.",
        "linear_error_share_on_target": "linear_error_share of that map.",
        "linear_error_share_rescaled_on_target": "linear_error_share_rescaled of that map.",
        "err_vec_r2_on_target": "err_vec_r2 of that map.",
        "err_vec_r2_mean_dim_on_target": "err_vec_r2_mean_dim of that map.",
        "err_norm_r2_on_target": "err_norm_r2 of that map.",
        "authors_fvu_total": "fvu of all tokens, those that fitted the map too, as in the scripts of arXiv:2410.14670.",
        "authors_fvu_nonlinear": "fvu_nonlinear as there: no bias, tokens split at random, and all of them counted.",
        "authors_err_vec_r2_mean_dim": "err_vec_r2_mean_dim as there: no bias, tokens split at random.",
        "authors_err_norm_r2": "err_norm_r2 as there: no bias, tokens split at random.",
        "dark_matter_notes": "What to know before reading these figures: too few tokens, a dead dictionary, why some are "
        "undefined.",
        "dark_matter_noise_floor": "About the linear_error_share of an error unrelated to the activation: the map fits noise.",
        "dark_matter_fit_tokens": "Tokens the linear map was fitted on.",
        "dark_matter_score_tokens": "Tokens it was scored on.",
        "dark_matter_enough_tokens": "Whether the fit had ten tokens per coefficient. If not, the linear share is understated.",
        "dark_matter_needed_tokens": "Tokens that would be ten per coefficient.",
        "dark_matter_bias": "Whether the map has a bias.",
        "dark_matter_ridge": "Ridge of the map, in units of the mean square of what is read.",
    },
    "Cost of the error's parts": {
        f"{key}{end}": words + bound
        for key, words in {
            "ce_spliced_with_linear_error": "Cross-entropy with reconstructions and the linear error added back.",
            "ce_spliced_with_nonlinear_error": "Cross-entropy with reconstructions and the nonlinear error added back.",
            "ce_recovered_by_linear_error": "Share of ce_increase that adding back the linear error undoes. The two "
            "shares need not add up to 1: the model is not linear.",
            "ce_recovered_by_nonlinear_error": "Share of ce_increase that adding back the nonlinear error undoes.",
            "kl_recovered_by_linear_error": "Share of kl_spliced that adding back the linear error undoes.",
            "kl_recovered_by_nonlinear_error": "Share of kl_spliced that adding back the nonlinear error undoes.",
            "variance_recovered_by_linear_error": "Share of the squared error that adding back the linear error undoes.",
            "variance_recovered_by_nonlinear_error": "Share of the squared error that the nonlinear one undoes.",
            "error_norm_share_of_linear": "Mean norm of the linear error over mean norm of the error.",
            "error_norm_share_of_nonlinear": "Mean norm of the nonlinear error over mean norm of the error.",
        }.items()
        for end, bound in {
            "": "",
            "_low": " Lower end of the 95 % bootstrap over documents.",
            "_high": " Upper end of the 95 % bootstrap over documents.",
        }.items()
    }
    | {"share_documents": "Documents that these intervals draw from."},
    "What predicts norms": {
        f"{target}_r2_from_{predictor}": f"Held-out R\u00b2 of {what} from {by}."
        for target, what in {
            "err_norm": "the squared error norm",
            "reconstruction_norm": "the squared norm of the reconstruction",
            "input_norm": "the squared norm of what is read",
        }.items()
        for predictor, by in {
            "activation": "what is read, linearly, on tokens whose loss is defined. For what is read itself this is the "
            "baseline: that a norm is predictable is not much",
            "token_id": "the token: its mean in other documents",
            "token_id_in_sample": "the token, its mean on the very tokens that are scored: too high, as every rare token "
            "predicts itself; the published figure",
            "input_norm": "the norm of what is read",
            "l0": "how many latents fire",
            "loss": "the untouched model's loss there",
        }.items()
    }
    | {
        "norm_fit_tokens": "Tokens that fitted these predictors.",
        "norm_score_tokens": "Tokens that scored them.",
        "norm_unseen_token_share": "Share of these whose token the fitted documents do not have; the mean stands in.",
    },
}
