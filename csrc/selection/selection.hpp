// Which channels of networks side by side are missed least: one run of losses.
#pragma once

#include <cstdint>

namespace clafusion {

// What is left of a least-squares readout W of features whose inverse Gram matrix is S, with
// M = W D^2 W^T. Channel c has the features [c * width, (c + 1) * width); those from
// channels * width on belong to none. Matrices are row-major.
//
// Of few outputs M is given by its two sides, -D^2 W^T and W^T, each (outputs, features): the rows
// that a loss asks for are multiplied when it does, which is less work than to keep M up to date.
//
// A loss of features g takes rows^T solved off S and given^T half + half^T given off M, with
// rows = S[g, :], solved = given = S[g, g]^-1 rows and half = M[g, :] - M[g, g] solved / 2. The
// matrices stay as they are: a loss adds `width` rows to each of these four.
struct ChannelLosses {
  std::int64_t features, channels, width;
  std::int64_t outputs;    // 0: M is given as it is
  double* inverse;         // S, (features, features): the lower triangle is read
  const double* products;  // M, likewise; or one side behind the other
  double* blocks;          // of S, each channel's own, up to date: (channels, width, width)
  double* read;            // of M, likewise
  double* settled;         // diagonals of `blocks` when S was up to date: (channels, width)
  double* rows;            // (capacity * width, features), as the next three
  double* solved;
  double* given;
  double* half;
  bool* left;              // (channels): which there are
  std::int64_t* lost;      // (capacity): which have gone, in their order
};

// Takes `count` channels away, one by one, each time the one whose loss costs least,
// tr(S[g, g]^-1 M[g, g]); of equals the first. There must be as many left and room for them.
//
// Where a loss leaves less than `cancelled` of a number on the diagonal of a channel's block, its
// rows and columns of S are brought up to date, and those of `rows` and `solved` set to zero, so
// that block and rows agree to the last digit.
void lose_channels(const ChannelLosses& of, std::int64_t count, double cancelled);

// Moves the rows and columns `kept`, in ascending order, of a symmetric matrix (size, size) to its
// start, where they become (count, count). Only the lower triangle is read and written.
void keep_lower(double* matrix, std::int64_t size, const std::int64_t* kept, std::int64_t count);

}  // namespace clafusion
