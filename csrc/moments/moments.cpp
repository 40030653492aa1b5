#include "moments/moments.hpp"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/parallel.hpp"
#include "common/simd.hpp"

namespace clafusion {
namespace {

constexpr std::int64_t kLanes = 32;        // sums that are independent, so that they fill vectors
constexpr std::int64_t kRun = 1024;        // values a lane sums in float32
constexpr std::int64_t kRows = 64;         // rows of channels that are a part
constexpr std::int64_t kShortest = 4;      // an inner length below which a row is never a part
constexpr std::int64_t kMany = 32;         // outer entries: with fewer it is one
constexpr std::int64_t kLong = 256;        // inner lengths from which on a row is a part, and with
constexpr std::int64_t kLongIfWide = 128;  // wide entries, whose columns lie far apart, earlier
constexpr std::int64_t kWide = 1 << 16;    // values of an outer entry
constexpr std::int64_t kGrain = 1 << 15;   // values that are worth a thread

struct Sums {
  double of_values;
  double of_squares;
};

CLAFUSION_INLINE double total_of(float (&lanes)[kLanes]) {
  for (std::int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return static_cast<double>(lanes[0]);
}

CLAFUSION_INLINE double sum_of(const float* x, std::int64_t count) {
  double total = 0.0;
  for (std::int64_t start = 0; start < count; start += kLanes * kRun) {
    const std::int64_t end = std::min(count, start + kLanes * kRun);
    float lanes[kLanes] = {};
    std::int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane];
    }
    for (; i < end; ++i) lanes[i % kLanes] += x[i];
    total += total_of(lanes);
  }
  return total;
}

// The sums of the values less `origin` and of their squares.
CLAFUSION_INLINE Sums sums_from(const float* x, std::int64_t count, float origin) {
  Sums total{0.0, 0.0};
  for (std::int64_t start = 0; start < count; start += kLanes * kRun) {
    const std::int64_t end = std::min(count, start + kLanes * kRun);
    float lanes[kLanes] = {};
    float squares[kLanes] = {};
    std::int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        const float value = x[i + lane] - origin;
        lanes[lane] += value;
        squares[lane] += value * value;
      }
    }
    for (; i < end; ++i) {
      const float value = x[i] - origin;
      lanes[i % kLanes] += value;
      squares[i % kLanes] += value * value;
    }
    total.of_values += total_of(lanes);
    total.of_squares += total_of(squares);
  }
  return total;
}

// The sum of `count` squared deviations from the mean, of those from an origin near it.
//
// Of channels that are all but zero float32 loses the squares, though not the values' sum: then it
// is 0 and not less, which would be no variance.
CLAFUSION_INLINE double squares_from_mean(double of_squares, double of_values, double count) {
  const double found = of_squares - of_values * of_values / count;
  return found < 0.0 ? 0.0 : found;  // NaN stays NaN
}

// Rows [begin, end) of (outer * channels): each row's mean and sum of squared deviations.
//
// A first sum gives the mean up to float32's rounding. Values less that are small, and what their
// own sum says of the mean is exact enough.
CLAFUSION_MULTIVERSION
void moments_of_rows(const float* x, std::int64_t inner, std::int64_t begin, std::int64_t end,
                     double* mean, double* squares) {
  const auto count = static_cast<double>(inner);
  for (std::int64_t row = begin; row < end; ++row) {
    const float* values = x + row * inner;
    const auto origin = static_cast<float>(sum_of(values, inner) / count);
    const Sums found = sums_from(values, inner, origin);
    mean[row] = static_cast<double>(origin) + found.of_values / count;
    squares[row] = squares_from_mean(found.of_squares, found.of_values, count);
  }
}

// Up to kLanes columns of `rows` rows, `stride` numbers apart: as moments_of_columns does.
//
// The sums stay in registers: kept in memory, each row would wait for the one before.
CLAFUSION_INLINE void moments_of_some(const float* x, std::int64_t rows, std::int64_t stride,
                                      std::int64_t columns, double* mean, double* squares) {
  const auto count = static_cast<double>(rows);
  float sums[kLanes] = {};
  float origins[kLanes];
  float of_squares[kLanes] = {};
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* values = x + row * stride;
    for (std::int64_t c = 0; c < columns; ++c) sums[c] += values[c];
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    origins[c] = static_cast<float>(static_cast<double>(sums[c]) / count);
    sums[c] = 0.0f;
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* values = x + row * stride;
    for (std::int64_t c = 0; c < columns; ++c) {
      const float value = values[c] - origins[c];
      sums[c] += value;
      of_squares[c] += value * value;
    }
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    const auto sum = static_cast<double>(sums[c]);
    mean[c] = static_cast<double>(origins[c]) + sum / count;
    squares[c] = squares_from_mean(static_cast<double>(of_squares[c]), sum, count);
  }
}

// `rows` rows of `width` numbers: each column's mean and sum of squared deviations.
CLAFUSION_MULTIVERSION
void moments_of_columns(const float* x, std::int64_t rows, std::int64_t width, double* mean,
                        double* squares) {
  std::int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    moments_of_some(x + c, rows, width, kLanes, mean + c, squares + c);
  }
  if (c < width) moments_of_some(x + c, rows, width, width - c, mean + c, squares + c);
}

CLAFUSION_INLINE float clamped(float value, float low, float high) {
  const float raised = value < low ? low : value;
  return raised > high ? high : raised;
}

CLAFUSION_MULTIVERSION
void scale_rows(const float* x, std::int64_t channels, std::int64_t inner, std::int64_t begin,
                std::int64_t end, const Rescaling& how, float* out) {
  const auto [scale, shift, other, low, high] = how;
  for (std::int64_t row = begin; row < end; ++row) {
    const float factor = scale[row % channels];
    const float offset = shift[row % channels];
    const std::int64_t start = row * inner;
    CLAFUSION_IVDEP
    for (std::int64_t i = start; i < start + inner; ++i) {
      const float added = other == nullptr ? 0.0f : other[i];
      out[i] = clamped(x[i] * factor + offset + added, low, high);
    }
  }
}

CLAFUSION_MULTIVERSION
void scale_columns(const float* x, std::int64_t channels, std::int64_t begin, std::int64_t end,
                   const Rescaling& how, float* out) {
  const auto [scale, shift, other, low, high] = how;
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t start = row * channels;
    CLAFUSION_IVDEP
    for (std::int64_t c = 0; c < channels; ++c) {
      const float added = other == nullptr ? 0.0f : other[start + c];
      out[start + c] = clamped(x[start + c] * scale[c] + shift[c] + added, low, high);
    }
  }
}

// Joins parts: counts[p] values of part p, whose channel c is at p * channels + c.
void join(const std::vector<double>& means, const std::vector<double>& squares,
          const std::vector<double>& counts, std::int64_t channels, double* mean,
          double* variance) {
  double total = 0.0;
  for (const double count : counts) total += count;
  const auto parts = static_cast<std::int64_t>(counts.size());
  std::fill(mean, mean + channels, 0.0);
  std::fill(variance, variance + channels, 0.0);
  for (std::int64_t p = 0; p < parts; ++p) {
    const double share = counts[p] / total;
    for (std::int64_t c = 0; c < channels; ++c) mean[c] += share * means[p * channels + c];
  }
  for (std::int64_t p = 0; p < parts; ++p) {
    const double share = counts[p] / total;
    for (std::int64_t c = 0; c < channels; ++c) {
      const double off = means[p * channels + c] - mean[c];
      variance[c] += squares[p * channels + c] / total + share * off * off;
    }
  }
}

// Whether the `inner` values of a channel that lie behind each other are summed by themselves, or
// all channels side by side.
bool rows_are_parts(ChannelLayout layout) {
  const auto [outer, channels, inner] = layout;
  if (outer < kMany) return inner >= kShortest;
  return inner >= (channels * inner > kWide ? kLongIfWide : kLong);
}

// How many rows of few channels are read as one, so that it fills vectors.
std::int64_t rows_as_one(std::int64_t rows, std::int64_t channels) {
  std::int64_t folded = 1;
  while (channels * folded < kLanes && rows % (2 * folded) == 0) folded *= 2;
  return folded;
}

std::vector<double> transposed(const std::vector<double>& x, std::int64_t rows,
                               std::int64_t columns) {
  std::vector<double> found(x.size());
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) found[j * rows + i] = x[i * columns + j];
  }
  return found;
}

void check(ChannelLayout layout) {
  if (layout.outer < 0 || layout.channels < 0 || layout.inner < 0) {
    throw std::invalid_argument("sizes must not be negative");
  }
}

}  // namespace

void channel_moments(const float* x, ChannelLayout layout, double* mean, double* variance) {
  check(layout);
  const auto [outer, channels, inner] = layout;
  if (outer * inner == 0) throw std::invalid_argument("there are no values");
  if (channels == 0) return;
  std::vector<double> means, squares, counts;
  if (rows_are_parts(layout)) {
    means.resize(outer * channels);
    squares.resize(outer * channels);
    counts.assign(outer, static_cast<double>(inner));
    const std::int64_t grain = std::max<std::int64_t>(1, kGrain / inner);
    parallel_for(outer * channels, grain, [&](std::int64_t begin, std::int64_t end) {
      moments_of_rows(x, inner, begin, end, means.data(), squares.data());
    });
    join(means, squares, counts, channels, mean, variance);
    return;
  }
  // With few values behind each other a row holds each channel `inner` times, and with few channels
  // `folded` rows are read as one: either way each channel is at several places of a row.
  const std::int64_t folded = inner == 1 ? rows_as_one(outer, channels) : 1;
  const std::int64_t rows = outer / folded;
  const std::int64_t width = channels * inner * folded;
  const std::int64_t parts = (rows + kRows - 1) / kRows;
  means.resize(parts * width);
  squares.resize(parts * width);
  for (std::int64_t p = 0; p < parts; ++p) {
    counts.push_back(static_cast<double>(std::min(kRows, rows - p * kRows)));
  }
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain / (kRows * width));
  parallel_for(parts, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      moments_of_columns(x + p * kRows * width, static_cast<std::int64_t>(counts[p]), width,
                         means.data() + p * width, squares.data() + p * width);
    }
  });
  const std::int64_t places = inner * folded;
  if (places == 1) {
    join(means, squares, counts, channels, mean, variance);
    return;
  }
  std::vector<double> of_places(width), spread(width), each(places, 1.0);
  join(means, squares, counts, width, of_places.data(), spread.data());
  if (inner > 1) {  // the channels are to be the inner axis
    of_places = transposed(of_places, channels, inner);
    spread = transposed(spread, channels, inner);
  }
  join(of_places, spread, each, channels, mean, variance);  // of places that count alike
}

void scale_channels(const float* x, ChannelLayout layout, const Rescaling& how, float* out) {
  check(layout);
  const auto [outer, channels, inner] = layout;
  if (outer * channels * inner == 0) return;
  if (inner == 1) {
    const std::int64_t folded = rows_as_one(outer, channels);
    const std::int64_t width = channels * folded;
    std::vector<float> scale, shift;
    for (std::int64_t i = 0; i < folded; ++i) {
      scale.insert(scale.end(), how.scale, how.scale + channels);
      shift.insert(shift.end(), how.shift, how.shift + channels);
    }
    const Rescaling of_row{scale.data(), shift.data(), how.other, how.low, how.high};
    const std::int64_t grain = std::max<std::int64_t>(1, kGrain / width);
    parallel_for(outer / folded, grain, [&](std::int64_t begin, std::int64_t end) {
      scale_columns(x, width, begin, end, of_row, out);
    });
    return;
  }
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain / inner);
  parallel_for(outer * channels, grain,
               [&, channels = channels, inner = inner](std::int64_t begin, std::int64_t end) {
                 scale_rows(x, channels, inner, begin, end, how, out);
               });
}

}  // namespace clafusion
