"""Glossary of the report (section -> entry -> explanation), shown on the report and comparison pages and in docs/report.md."""

PROVENANCE = "Dictionary and data"
# A latent firing on a larger fraction of tokens is dense: it carries little information about any of them.
DENSE = 0.1
EXPLANATIONS: dict[str, dict[str, str]] = {
    PROVENANCE: {
        "report_version": "Version of the report's format. An entry whose definition changes gets a new name.",
        "checkpoint": "Path the dictionary was loaded from.",
        "kind": "An SAE reconstructs its own input; a transcoder predicts the output of a module from its input. The "
        "activation to be reconstructed is called the target; for an SAE it is the input.",
        "encoder": "Encoder variant and its arguments.",
        "d_in": "Width of the input activation.",
        "d_out": "Width of the output; equals d_in for an SAE.",
        "n_latents": "Number of latents (learned units).",
        "selection": "Inference mode of the evaluation, i.e. how active latents are selected; 'per token' is the normal mode.",
        "hook": "Module path and side of the activation that the dictionary was trained on; both activations of a transcoder.",
        "model": "Language model that produced the activations.",
        "text": "Corpus. Only documents held out from training are evaluated.",
        "training_tokens": "Number of training tokens; repeated tokens count every time.",
        "start": "Dictionary that training began with (warm start); present only then, as the next six entries are.",
        "fvu_before_training": "fvu of the dictionary before the first training step, measured by the training run.",
        "l0_before_training": "Mean number of active latents per token before the first training step, on the same tokens.",
        "fvu_after_training": "fvu after training, on the same tokens: compare it with fvu_before_training, not with fvu.",
        "l0_after_training": "Mean number of active latents per token after training, on the same tokens as before.",
        "start_tokens": "Number of tokens on which the dictionary was judged before and after training.",
        "start_judged_on": "Split that these tokens are from: 'held-out', or 'training' if the source holds nothing out.",
        "weights_sha256": "SHA-256 of the dictionary's weights file, to check that the file is the one evaluated.",
        "git_commit": "Version of the code that trained the dictionary.",
        "seed": "Training seed: initial weights and token order.",
        "recipe_digest": "Digest of the recipe without seed and directory: equal for runs that differ only in these.",
        "documents": "Number of held-out documents scored. The mean and the linear error are fitted on other documents.",
        "tokens": "Number of tokens scored, without excluded positions (special tokens, the first few of a context).",
        "tokens_asked": "Number of tokens requested, half of them for scoring. Shorter held-out text is split in half.",
        "fit_tokens": "Number of tokens that the mean and the linear error are fitted on.",
        "documents_shared": "Number of documents split between both halves: 0, unless there are too few to keep them whole.",
        "shortfalls": "Quantities (steps, tokens) that training or evaluation requested and did not reach; also logged.",
        "assumed": "Settings that neither the checkpoint nor the caller specifies, taken from the recipe defaults.",
        "skipped": "Rows of text and tokens that were unusable in training or evaluation and were skipped, or repaired with "
        "U+FFFD. Present only if there were any.",
        "doubts": "Signs in these figures of a wrong hook, normalization or scale, and shortfalls of more than half; each was "
        "also logged.",
        "reasons": "Reason for each null entry. A report contains no NaN and no infinity.",
    },
    "Reconstruction": {
        "fvu": "Fraction of variance unexplained: squared error summed over all tokens, divided by the summed squared "
        "distance of the targets from their mean. 0 is perfect, 1 is no better than the mean. Differs from a mean of per-token "
        "ratios.",
        "cosine": "Cosine between target and reconstruction, mean over tokens. 1 is perfect.",
        "l2_ratio": "Norm of the reconstruction divided by the norm of the target, mean over tokens. Below 1 is shrinkage.",
        "relative_reconstruction_bias": "Sum of squared reconstruction norms divided by the sum of dot products of "
        "reconstruction and target. 1 is unbiased, below 1 is shrinkage (arXiv:2404.16014, eq. 10).",
        "fvu_low": "Lower end of the confidence interval of fvu; see interval_level.",
        "fvu_high": "Upper end of the same interval.",
        "mse": "Squared norm of the error, mean over tokens; in the activation's own units.",
        "mse_per_dimension": "mse / d_out.",
        "fvu_affine": "The fvu of the best affine map from a transcoder's input to the target, fitted on other documents: "
        "a baseline to beat. Overestimated if fitted on few tokens (see dark_matter_enough_tokens).",
    },
    "Other definitions of explained variance": {
        "ev_global": "1 - fvu. Preferred: one mean, one ratio of sums.",
        "ev_mean_dim": "R\u00b2 per dimension, then the unweighted mean: dimensions of little variance count as much as "
        "those that carry the signal, and may push it far below 0.",
        "ev_residual_variance": "1 - variance of the error / variance of the target (dictionary_learning's "
        "frac_variance_explained): ignores a constant offset of the reconstruction.",
        "ev_scalar_mean": "R\u00b2 about a single scalar, the mean over tokens and dimensions (overcomplete's r2_score): "
        "the mean direction counts as signal.",
        "ev_uncentred": "1 - squared error / squared norm of the target, without centering: the mean counts as signal.",
        "ev_mean_token": "1 - mean over tokens of squared error / squared norm of the target (the normalized MSE of several "
        "libraries): tokens of small norm weigh most. Tokens with a zero target are skipped.",
    },
    "Tokens of high norm": {
        "high_norm_threshold": "10 times the median target norm on the first half of the documents (accurate to 1%). Tokens "
        "above it are of high norm: often the first of a context, or a delimiter.",
        "high_norm_tokens": "Number of scored tokens of high norm.",
        "high_norm_energy_share": "Their share of the targets' summed squared norms.",
        "fvu_without_high_norm": "fvu of the other tokens, about their own mean.",
        "cosine_without_high_norm": "cosine of the other tokens.",
        "l2_ratio_without_high_norm": "l2_ratio of the other tokens.",
        "l0_mean_without_high_norm": "l0_mean of the other tokens.",
    },
    "Sparsity": {
        "l0_mean": "Number of active latents per token, mean over tokens.",
        "l0_p10": "10th percentile of active latents per token.",
        "l0_median": "Median of active latents per token.",
        "l0_p90": "90th percentile of active latents per token.",
        "dead_fraction": "Fraction of latents that never fire on the scored tokens. Decreases with the number of tokens: "
        "compare equal windows only.",
        "dead_window_tokens": "Length of that window in tokens.",
        "dead_training_fraction": "Fraction of latents that did not fire on the last training tokens, with latents selected as "
        "in training batches; null if the checkpoint does not record it. Claims about dead latents need at least a million "
        "tokens.",
        "dead_training_window_tokens": "Length of that window: the recipe's dead_after_tokens, or all training tokens.",
        "dense_fraction": f"Fraction of latents that fire on more than {DENSE:g} of the tokens.",
        "frequent_fraction": "Fraction of latents that fire on more than 0.01 of the tokens.",
        "effective_latents": "Exponential of the entropy of the latents' shares of all firings: the number of equally active "
        "latents with the same entropy.",
        "l0_histogram_counts": "Number of tokens with exactly 0, 1, 2, ... active latents.",
        "l0_histogram_edges": "Bin edges of these counts: 0, 1, 2, ... and the end of the last bin.",
        "density_histogram_counts": "Number of latents by log10 of their firing density; dead latents are in no bin.",
        "density_histogram_log10_edges": "Bin edges of these counts.",
    },
    "Nested dictionaries of Matryoshka": {
        "prefix_latents": "Widths of the nested dictionaries: the first latents of the dictionary, so many of them.",
        "prefix_fvu": "fvu of the reconstruction from the latents of each width alone; the last is fvu.",
        "prefix_l0": "Active latents per token within each width, mean over tokens; the last is l0_mean.",
    },
    "Intervals": {
        "interval_level": "Level of the percentile intervals whose ends are the entries in _low and _high: documents are "
        "resampled with replacement (bootstrap) and the figure is recomputed from their sums. The dictionary and everything "
        "fitted on the first half are held fixed.",
        "interval_resamples": "Number of bootstrap resamples.",
        "interval_seed": "Seed of the resampling.",
    },
    "Weights": {
        "decoder_max_cosine_mean": "Largest absolute cosine between a latent's decoder direction and any other, mean over "
        "latents. Random directions give about sqrt(2 ln n_latents / d_out).",
        "decoder_max_cosine_median": "Median over latents of the same cosine.",
        "decoder_max_cosine_p90": "90th percentile over latents of the same cosine.",
        "decoder_near_copies_fraction": "Fraction of latents whose decoder direction has an absolute cosine above 0.9 with "
        "another.",
        "decoder_latents_compared": "Number of latents in these statistics: all, or an evenly spaced subset of a very wide "
        "dictionary. Each is compared with all others.",
        "encoder_decoder_cosine_mean": "Cosine between a latent's encoder row and its decoder direction, mean over latents; "
        "null for tied weights, or if encoder and decoder act on different spaces.",
        "encoder_decoder_cosine_median": "Median over latents of the same cosine.",
    },
    "Effect on the model": {
        "downstream_tokens": "Number of predictions scored: replaced positions whose next token belongs to the same document. "
        "Excluded positions keep the original activation.",
        "ce_clean": "Cross-entropy of the original model, nats per token.",
        "ce_spliced": "Cross-entropy with reconstructions in place of the targets, nats per token.",
        "ce_zero": "Cross-entropy with the targets zero-ablated, nats per token.",
        "ce_mean": "Cross-entropy with the targets mean-ablated, nats per token.",
        "kl_spliced": "KL divergence from the original predictions to those with reconstructions, nats per token.",
        "kl_zero": "The same KL divergence with zero ablation, nats per token.",
        "kl_mean": "The same KL divergence with mean ablation, nats per token.",
        "ce_increase": "ce_spliced - ce_clean: the cost of the dictionary to the model, nats per token.",
        "top1_agreement": "Fraction of predictions whose most likely token is unchanged.",
        "ce_recovered_zero": "(ce_ablated - ce_spliced) / (ce_ablated - ce_clean) with zero ablation. 1 is perfect, 0 no "
        "better than zeros; undefined if the ablation has no cost.",
        "ce_recovered_mean": "The same fraction with mean ablation: the fairer baseline.",
        "kl_recovered_zero": "(kl_zero - kl_spliced) / kl_zero.",
        "kl_recovered_mean": "(kl_mean - kl_spliced) / kl_mean.",
        "ce_resample": "Cross-entropy with each target replaced by the activation of another token from the first half of the "
        "documents, nats per token: an ablation that stays in distribution.",
        "kl_resample": "The same KL divergence with resample ablation, nats per token.",
        "ce_recovered_resample": "The fraction recovered with resample ablation.",
        "kl_recovered_resample": "(kl_resample - kl_spliced) / kl_resample.",
        "token_ce_increase_p05": "5th percentile over predictions of the increase in loss, nats; negative is an improvement. "
        "Percentiles over single predictions are accurate to 1%, or 0.00001 nats.",
        "token_ce_increase_median": "Median over predictions of the increase in loss.",
        "token_ce_increase_p95": "95th percentile over predictions of the increase in loss.",
        "token_ce_increase_p99": "99th percentile over predictions of the increase in loss.",
        "token_ce_better_fraction": "Fraction of predictions whose loss is lower with reconstructions than without.",
        "ce_increase_low": "Lower end of the confidence interval of ce_increase; see interval_level.",
        "ce_increase_high": "Upper end of the same interval.",
        "kl_spliced_low": "Lower end of the confidence interval of kl_spliced.",
        "kl_spliced_high": "Upper end of the same interval.",
        "top1_agreement_low": "Lower end of the confidence interval of top1_agreement.",
        "top1_agreement_high": "Upper end of the same interval.",
        "ce_recovered_zero_low": "Lower end of the confidence interval of ce_recovered_zero.",
        "ce_recovered_zero_high": "Upper end of the same interval.",
        "ce_recovered_mean_low": "Lower end of the confidence interval of ce_recovered_mean.",
        "ce_recovered_mean_high": "Upper end of the same interval.",
        "ce_recovered_resample_low": "Lower end of the confidence interval of ce_recovered_resample.",
        "ce_recovered_resample_high": "Upper end of the same interval.",
    },
    "Sparsity of the language model": {
        "mlp_active_share": "Fraction of the model's own MLP neurons with a nonzero activation, mean over scored tokens, by "
        "layer: the sparsity that the model has without a dictionary. Measured where the activation function, or the gate that "
        "multiplies the neurons, is zero below zero (ReLU, squared ReLU); null elsewhere (GELU, SiLU).",
    },
    "Error, linear and nonlinear": {
        "fvu_total": "fvu on the tokens that score the regression: linear plus nonlinear error.",
        "fvu_nonlinear": "fvu_total that remains after a linear map of the dictionary's input, fitted on other data, has "
        "predicted the error. A low value alone is no merit, since an empty dictionary has none: compare with fvu_total.",
        "linear_error_share": "1 - fvu_nonlinear / fvu_total: share of the squared error that is linear in the activation.",
        "fvu_rescaled": "fvu_total after scaling the reconstruction by its best factor; the decrease is due to shrinkage.",
        "best_factor": "That factor. Above 1, the dictionary shrinks.",
        "linear_error_share_rescaled": "linear_error_share after that scaling: linear error beyond shrinkage.",
        "reconstruction_variance": "Variance of the reconstruction divided by that of the target. 0 is a dead dictionary, "
        "whose whole error is linear by construction.",
        "err_vec_r2": "R\u00b2 of the linear prediction of the error, all dimensions together, about the error's mean.",
        "err_vec_r2_mean_dim": "R\u00b2 of the linear prediction of the error per dimension, then averaged.",
        "err_norm_r2": "R\u00b2 of the linear prediction of the squared error norm.",
        "fvu_nonlinear_on_target": "fvu_nonlinear with a map of the target instead of the dictionary's input: how much of the "
        "error is a linear distortion of the target.",
        "linear_error_share_on_target": "linear_error_share of that map.",
        "linear_error_share_rescaled_on_target": "linear_error_share_rescaled of that map.",
        "err_vec_r2_on_target": "err_vec_r2 of that map.",
        "err_vec_r2_mean_dim_on_target": "err_vec_r2_mean_dim of that map.",
        "err_norm_r2_on_target": "err_norm_r2 of that map.",
        "authors_fvu_total": "fvu of all tokens, including those the map is fitted on, as in the scripts of arXiv:2410.14670.",
        "authors_fvu_nonlinear": "fvu_nonlinear as in those scripts: no bias, tokens split at random, all of them scored.",
        "authors_err_vec_r2_mean_dim": "err_vec_r2_mean_dim as in those scripts: no bias, tokens split at random.",
        "authors_err_norm_r2": "err_norm_r2 as in those scripts: no bias, tokens split at random.",
        "dark_matter_notes": "Caveats for these figures: too few tokens, a dead dictionary, reasons for undefined entries.",
        "dark_matter_noise_floor": "Approximate linear_error_share of an error unrelated to the activation (fitted noise).",
        "dark_matter_fit_tokens": "Number of tokens the linear map is fitted on.",
        "dark_matter_score_tokens": "Number of tokens it is scored on.",
        "dark_matter_enough_tokens": "True if the fit had ten tokens per coefficient. Otherwise the linear share is "
        "underestimated.",
        "dark_matter_needed_tokens": "Number of tokens for ten per coefficient.",
        "dark_matter_bias": "True if the map has a bias.",
        "dark_matter_ridge": "Ridge penalty of the map, in units of the mean square of its input.",
    },
    "Cost of the error's parts": {
        f"{key}{end}": words + bound
        for key, words in {
            "ce_spliced_with_linear_error": "Cross-entropy with reconstructions and the linear error added back.",
            "ce_spliced_with_nonlinear_error": "Cross-entropy with reconstructions and the nonlinear error added back.",
            "ce_recovered_by_linear_error": "Share of ce_increase removed by adding back the linear error. The two "
            "shares need not add up to 1, because the model is not linear.",
            "ce_recovered_by_nonlinear_error": "Share of ce_increase removed by adding back the nonlinear error.",
            "kl_recovered_by_linear_error": "Share of kl_spliced removed by adding back the linear error.",
            "kl_recovered_by_nonlinear_error": "Share of kl_spliced removed by adding back the nonlinear error.",
            "variance_recovered_by_linear_error": "Share of the squared error removed by adding back the linear error.",
            "variance_recovered_by_nonlinear_error": "Share of the squared error removed by adding back the nonlinear error.",
            "error_norm_share_of_linear": "Mean norm of the linear error divided by the mean norm of the error.",
            "error_norm_share_of_nonlinear": "Mean norm of the nonlinear error divided by the mean norm of the error.",
        }.items()
        for end, bound in {
            "": "",
            "_low": " Lower end of the 95% bootstrap interval over documents.",
            "_high": " Upper end of the 95% bootstrap interval over documents.",
        }.items()
    }
    | {"share_documents": "Number of documents that these intervals resample."},
    "What predicts norms": {
        f"{target}_r2_from_{predictor}": f"Held-out R\u00b2 of {what} from {by}."
        for target, what in {
            "err_norm": "the squared error norm",
            "reconstruction_norm": "the squared norm of the reconstruction",
            "input_norm": "the squared norm of the dictionary's input",
        }.items()
        for predictor, by in {
            "activation": "the dictionary's input, linearly, on tokens with a defined loss. For input_norm this is the "
            "baseline: norms are easy to predict",
            "token_id": "the token: its mean in other documents",
            "token_id_in_sample": "the token: its mean on the scored tokens themselves, as published; too high, because every "
            "rare token predicts itself",
            "input_norm": "the norm of the dictionary's input",
            "l0": "the number of active latents",
            "loss": "the original model's loss at the token",
        }.items()
    }
    | {
        "norm_fit_tokens": "Number of tokens these predictors are fitted on.",
        "norm_score_tokens": "Number of tokens they are scored on.",
        "norm_unseen_token_share": "Fraction of scored tokens absent from the fitted documents; the mean is used instead.",
    },
}
