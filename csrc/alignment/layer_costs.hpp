// How alike the layers of two networks are, from Gram matrices over the same samples.
#pragma once

#include <cstdint>

namespace clafusion {

// Which estimate of the Hilbert-Schmidt independence criterion (HSIC).
enum class Hsic : std::int32_t {
  // The inner product of H K H and H L H with H = I - 1 1^T / S, up to a factor.
  biased = 0,
  // The inner product of the U-centred matrices with a zero diagonal (Song et al., JMLR 2012), up
  // to a factor; needs S >= 4.
  unbiased = 1,
};

// Writes the HSIC of all pairs, up to a factor that cancels in CKA: products (count_a, count_b)
// between the layers, norms_a (count_a) and norms_b (count_b) with themselves. Each Gram matrix is
// (samples, samples), symmetric; only its lower triangle is read. It is centred once, and its
// packed triangle takes part in all pairs.
//
// Sums are in float64, in an order that does not depend on the number of threads. Throws
// std::invalid_argument when there are fewer than 2 samples (unbiased: 4).
void hsic_all_pairs(const double* const* grams_a, std::int64_t count_a,
                    const double* const* grams_b, std::int64_t count_b, std::int64_t samples,
                    Hsic estimate, double* products, double* norms_a, double* norms_b);

}  // namespace clafusion
