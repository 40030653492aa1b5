#include "selection/selection.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "common/simd.hpp"

namespace clafusion {
namespace {

constexpr std::int64_t kTogether = 4;  // rows that are taken off at once

using Numbers = std::vector<double>;

// target[r, j] -= sum_i factors[i, r] * rows[i, j], for `count` rows i; `features` is the stride of
// all. In tiles of j, so that the target's rows stay in the first cache.
CLAFUSION_MULTIVERSION
void take_off(double* __restrict target, std::int64_t width, const double* factors,
              const double* rows, std::int64_t count, std::int64_t features) {
  const std::int64_t tile = std::max<std::int64_t>(2048 / width, 128);
  for (std::int64_t start = 0; start < features; start += tile) {
    const std::int64_t size = std::min(tile, features - start);
    std::int64_t i = 0;
    for (; i + kTogether <= count; i += kTogether) {
      const double* a = factors + i * features;
      const double* b = rows + i * features + start;
      for (std::int64_t r = 0; r < width; ++r) {
        double* __restrict t = target + r * features + start;
        const double a0 = a[r], a1 = a[r + features];
        const double a2 = a[r + 2 * features], a3 = a[r + 3 * features];
        for (std::int64_t j = 0; j < size; ++j) {
          t[j] -= (a0 * b[j] + a1 * b[j + features]) +
                  (a2 * b[j + 2 * features] + a3 * b[j + 3 * features]);
        }
      }
    }
    for (; i < count; ++i) {
      const double* b = rows + i * features + start;
      for (std::int64_t r = 0; r < width; ++r) {
        double* __restrict t = target + r * features + start;
        const double a = factors[i * features + r];
        for (std::int64_t j = 0; j < size; ++j) t[j] -= a * b[j];
      }
    }
  }
}

// Solves matrix x = sides for all columns in place, by elimination with pivots; `matrix`, (width,
// width), is of no use then.
CLAFUSION_MULTIVERSION
void solve(double* __restrict matrix, std::int64_t width, double* __restrict sides,
           std::int64_t columns) {
  for (std::int64_t k = 0; k < width; ++k) {
    std::int64_t pivot = k;
    for (std::int64_t i = k + 1; i < width; ++i) {
      if (std::abs(matrix[i * width + k]) > std::abs(matrix[pivot * width + k])) pivot = i;
    }
    if (pivot != k) {
      std::swap_ranges(matrix + k * width, matrix + (k + 1) * width, matrix + pivot * width);
      std::swap_ranges(sides + k * columns, sides + (k + 1) * columns, sides + pivot * columns);
    }
    for (std::int64_t i = k + 1; i < width; ++i) {
      const double factor = matrix[i * width + k] / matrix[k * width + k];
      for (std::int64_t j = k + 1; j < width; ++j) {
        matrix[i * width + j] -= factor * matrix[k * width + j];
      }
      const double* from = sides + k * columns;
      double* to = sides + i * columns;
      for (std::int64_t j = 0; j < columns; ++j) to[j] -= factor * from[j];
    }
  }
  for (std::int64_t k = width - 1; k >= 0; --k) {
    double* row = sides + k * columns;
    for (std::int64_t i = k + 1; i < width; ++i) {
      const double factor = matrix[k * width + i];
      const double* from = sides + i * columns;
      for (std::int64_t j = 0; j < columns; ++j) row[j] -= factor * from[j];
    }
    const double diagonal = matrix[k * width + k];
    for (std::int64_t j = 0; j < columns; ++j) row[j] /= diagonal;
  }
}

// block[p, q] -= sum_r a[r, p] * b[r, q]; with `both` the transpose as well.
void take_off_block(double* block, std::int64_t width, const double* a, const double* b,
                    std::int64_t features, bool both) {
  for (std::int64_t r = 0; r < width; ++r, a += features, b += features) {
    for (std::int64_t p = 0; p < width; ++p) {
      for (std::int64_t q = 0; q < width; ++q) {
        const double product = a[p] * b[q];
        block[p * width + q] -= product;
        if (both) block[q * width + p] -= product;
      }
    }
  }
}

class Run {
 public:
  Run(const ChannelLosses& of, double cancelled)
      : of_(of),
        cancelled_(cancelled),
        size_(of.width * of.features),
        mask_(static_cast<std::size_t>(of.features), 1.0),
        block_(static_cast<std::size_t>(of.width * of.width)),
        sides_(block_.size()),
        row_(static_cast<std::size_t>(size_)) {
    for (std::int64_t c = 0; c < of.channels; ++c) {
      if (!of.left[c]) std::fill_n(mask_.begin() + c * of.width, of.width, 0.0);
    }
  }

  void lose(std::int64_t index) {
    const std::int64_t channel = cheapest();
    const std::int64_t own = channel * of_.width;
    const std::int64_t done = index * of_.width;
    double* rows = of_.rows + done * of_.features;
    double* solved = of_.solved + done * of_.features;
    double* given = of_.given + done * of_.features;
    double* half = of_.half + done * of_.features;
    of_.lost[index] = channel;
    of_.left[channel] = false;

    up_to_date(channel, done, rows);
    copy_products(own, half);
    take_off(half, of_.width, of_.given + own, of_.half, done, of_.features);
    take_off(half, of_.width, of_.half + own, of_.given, done, of_.features);
    put_block(of_.read, channel, half);

    std::copy_n(rows, size_, solved);
    copy_block(of_.blocks, channel, block_);
    solve(block_.data(), of_.width, solved, of_.features);
    const double* read = of_.read + own * of_.width;
    for (std::int64_t r = 0; r < of_.width; ++r) {
      for (std::int64_t i = 0; i < of_.width; ++i) {
        const double factor = 0.5 * read[r * of_.width + i];
        const double* from = solved + i * of_.features;
        double* to = half + r * of_.features;
        for (std::int64_t j = 0; j < of_.features; ++j) to[j] -= factor * from[j];
      }
    }

    std::fill_n(mask_.begin() + own, of_.width, 0.0);  // what is lost changes no more
    for (std::int64_t r = 0; r < of_.width; ++r) {
      for (double* log : {rows, solved, half}) {
        for (std::int64_t j = 0; j < of_.features; ++j) {
          log[r * of_.features + j] *= mask_[static_cast<std::size_t>(j)];
        }
      }
    }
    std::copy_n(solved, size_, given);
    for (std::int64_t c = 0; c < of_.channels; ++c) {
      if (!of_.left[c]) continue;
      const std::int64_t at = c * of_.width, block = at * of_.width;
      take_off_block(of_.blocks + block, of_.width, rows + at, solved + at, of_.features, false);
      take_off_block(of_.read + block, of_.width, solved + at, half + at, of_.features, true);
    }
    for (std::int64_t c = 0; c < of_.channels; ++c) {
      if (of_.left[c] && is_cancelled(c)) refresh(c, done + of_.width);
    }
  }

 private:
  // The channel whose loss costs least.
  std::int64_t cheapest() {
    std::int64_t best = -1;
    double least = std::numeric_limits<double>::infinity();
    for (std::int64_t c = 0; c < of_.channels; ++c) {
      if (!of_.left[c]) continue;
      const double cost = std::max(0.0, this->cost(c));  // 0 for NaN
      if (best < 0 || cost < least) {
        best = c;
        least = cost;
      }
    }
    return best;
  }

  double cost(std::int64_t channel) {
    if (of_.width == 1) return of_.read[channel] / of_.blocks[channel];
    copy_block(of_.blocks, channel, block_);
    copy_block(of_.read, channel, sides_);
    solve(block_.data(), of_.width, sides_.data(), of_.width);
    double sum = 0.0;
    for (std::int64_t i = 0; i < of_.width; ++i) {
      sum += sides_[static_cast<std::size_t>(i * of_.width + i)];
    }
    return sum;
  }

  // A channel's rows of S after the loss of `done` features.
  void up_to_date(std::int64_t channel, std::int64_t done, double* rows) const {
    const std::int64_t own = channel * of_.width;
    copy_lower(of_.inverse, own, rows);
    take_off(rows, of_.width, of_.rows + own, of_.solved, done, of_.features);
    put_block(of_.blocks, channel, rows);
  }

  bool is_cancelled(std::int64_t channel) const {
    for (std::int64_t i = 0; i < of_.width; ++i) {
      const double now = of_.blocks[(channel * of_.width + i) * of_.width + i];
      if (now < cancelled_ * of_.settled[channel * of_.width + i]) return true;
    }
    return false;
  }

  void refresh(std::int64_t channel, std::int64_t done) {
    const std::int64_t own = channel * of_.width, end = own + of_.width;
    up_to_date(channel, done, row_.data());
    for (std::int64_t r = 0; r < of_.width; ++r) {
      const double* row = row_.data() + r * of_.features;
      std::copy_n(row, end, of_.inverse + (own + r) * of_.features);
      for (std::int64_t j = end; j < of_.features; ++j) {
        of_.inverse[j * of_.features + own + r] = row[j];
      }
      of_.settled[own + r] = of_.blocks[(own + r) * of_.width + r];
    }
    for (double* log : {of_.rows, of_.solved}) {
      for (std::int64_t i = 0; i < done; ++i) {
        std::fill_n(log + i * of_.features + own, of_.width, 0.0);
      }
    }
  }

  // A channel's rows of M as it was before this run.
  void copy_products(std::int64_t own, double* rows) const {
    if (of_.outputs == 0) {
      copy_lower(of_.products, own, rows);
      return;
    }
    std::fill_n(rows, size_, 0.0);
    const double* weights = of_.products + of_.outputs * of_.features;
    take_off(rows, of_.width, of_.products + own, weights, of_.outputs, of_.features);
  }

  // Rows of a symmetric matrix of which the lower triangle is there.
  void copy_lower(const double* matrix, std::int64_t own, double* rows) const {
    const std::int64_t end = own + of_.width;
    for (std::int64_t r = 0; r < of_.width; ++r) {
      std::copy_n(matrix + (own + r) * of_.features, end, rows + r * of_.features);
    }
    for (std::int64_t j = end; j < of_.features; ++j) {
      const double* from = matrix + j * of_.features + own;
      for (std::int64_t r = 0; r < of_.width; ++r) rows[r * of_.features + j] = from[r];
    }
  }

  void copy_block(const double* blocks, std::int64_t channel, Numbers& to) const {
    std::copy_n(blocks + channel * of_.width * of_.width, of_.width * of_.width, to.begin());
  }

  void put_block(const double* blocks, std::int64_t channel, double* rows) const {
    const double* block = blocks + channel * of_.width * of_.width;
    for (std::int64_t r = 0; r < of_.width; ++r) {
      std::copy_n(block + r * of_.width, of_.width,
                  rows + r * of_.features + channel * of_.width);
    }
  }

  const ChannelLosses& of_;
  const double cancelled_;
  const std::int64_t size_;
  Numbers mask_, block_, sides_, row_;
};

}  // namespace

void lose_channels(const ChannelLosses& of, std::int64_t count, double cancelled) {
  Run run(of, cancelled);
  for (std::int64_t i = 0; i < count; ++i) run.lose(i);
}

void keep_lower(double* matrix, std::int64_t size, const std::int64_t* kept, std::int64_t count) {
  // A number never moves behind one that is still to be read.
  for (std::int64_t i = 0; i < count; ++i) {
    double* to = matrix + i * count;
    const double* from = matrix + kept[i] * size;
    for (std::int64_t j = 0; j <= i; ++j) to[j] = from[kept[j]];
  }
}

}  // namespace clafusion
