// The mean and the variance of channels, and their rescaling with what follows it, in one pass over
// memory each.
#pragma once

#include <cstdint>

namespace clafusion {

// A tensor (outer, channels, inner), dense, with the channels in the middle: images have their
// pixels as `inner`, tokens have an `inner` of 1.
struct ChannelLayout {
  std::int64_t outer;
  std::int64_t channels;
  std::int64_t inner;
};

// Writes each channel's mean and its mean squared deviation from it.
//
// Values are summed in float32 in runs of at most 1024 a lane, and these sums in float64. Squares
// are of deviations from the mean of a part (one row of `inner`, or 64 values that lie a row of
// channels apart), and parts are joined in float64 (Chan, Golub and LeVeque, The American
// Statistician 37(3), 1983). The parts and their order depend on the layout only, not on the number
// of threads.
//
// Throws std::invalid_argument when a size is negative or there are no values.
void channel_moments(const float* x, ChannelLayout layout, double* mean, double* variance);

// What is done to a value of a channel: out = clamp(x * scale[channel] + shift[channel] + other).
//
// `other` lies as x does; null adds nothing. A value below `low` becomes `low`, above `high`
// `high`, and NaN stays.
struct Rescaling {
  const float* scale;
  const float* shift;
  const float* other;
  float low;
  float high;
};

// Writes each rescaled value to `out`, which is `x` itself or memory that neither x nor other has.
void scale_channels(const float* x, ChannelLayout layout, const Rescaling& how, float* out);

}  // namespace clafusion
