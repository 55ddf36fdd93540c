// Detect in one picture: detect MODEL PICTURE.ppm. A line a detection: score, name, box (xyxy, the picture's pixels).
// Masks and keypoints are in `found` too, shaped as contract.h says.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>

#include "contract.h"
#include "engine.h"

struct Picture {
    int height = 0, width = 0;
    std::vector<std::uint8_t> rgb;  // [height, width, 3]
};

Picture read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string kind;
    int largest = 0;
    Picture picture;
    file >> kind >> picture.width >> picture.height >> largest;
    file.get();
    if (!file || kind != "P6" || largest != 255 || picture.width < 1 || picture.height < 1)
        throw std::runtime_error(path + ": not a binary PPM of 8 bits; convert PICTURE PICTURE.ppm makes one");
    picture.rgb.resize(std::size_t(3) * picture.height * picture.width);
    if (!file.read(reinterpret_cast<char*>(picture.rgb.data()), std::streamsize(picture.rgb.size())))
        throw std::runtime_error(path + ": ends too early");
    return picture;
}

// Bilinear, pixel centres at half integers.
Picture resize(const Picture& source, int height, int width) {
    Picture target{height, width, std::vector<std::uint8_t>(std::size_t(3) * height * width)};
    const auto position = [](int index, int from, int to) {
        return std::clamp((index + 0.5) * from / to - 0.5, 0.0, from - 1.0);
    };
    for (int row = 0; row < height; ++row) {
        const double y = position(row, source.height, height);
        const int top = int(y), bottom = std::min(top + 1, source.height - 1);
        for (int column = 0; column < width; ++column) {
            const double x = position(column, source.width, width);
            const int left = int(x), right = std::min(left + 1, source.width - 1);
            for (int channel = 0; channel < 3; ++channel) {
                const auto at = [&](int r, int c) {
                    return double(source.rgb[(std::size_t(r) * source.width + c) * 3 + channel]);
                };
                const double upper = at(top, left) * (left + 1 - x) + at(top, right) * (x - left);
                const double lower = at(bottom, left) * (left + 1 - x) + at(bottom, right) * (x - left);
                target.rgb[(std::size_t(row) * width + column) * 3 + channel] =
                    std::uint8_t(std::floor(upper * (top + 1 - y) + lower * (y - top) + 0.5));
            }
        }
    }
    return target;
}

// The picture in the top left corner of the first image of a batch, as the graph takes it.
std::vector<char> to_input(const Picture& content) {
    std::vector<char> input(contract::INPUT_BYTES);
    for (int row = 0; row < contract::HEIGHT; ++row)
        for (int column = 0; column < contract::WIDTH; ++column)
            for (int channel = 0; channel < 3; ++channel) {
                const bool inside = row < content.height && column < content.width;
                const std::uint8_t value =
                    inside ? content.rgb[(std::size_t(row) * content.width + column) * 3 + channel]
                           : contract::PADDING_COLOUR[channel];
                if (contract::UINT8_INPUT)
                    input[(std::size_t(row) * contract::WIDTH + column) * 3 + channel] = char(value);
                else
                    reinterpret_cast<float*>(
                        input.data())[(std::size_t(channel) * contract::HEIGHT + row) * contract::WIDTH + column] =
                        float(value) / 255.0f;
            }
    return input;
}

int detect(const std::string& model, const std::string& file) {
    const Picture picture = read_ppm(file);
    const bool fits = picture.height == contract::HEIGHT && picture.width == contract::WIDTH;
    if (!contract::LETTERBOX && !fits)
        throw std::runtime_error("the graph takes pictures of one size only, see contract.h");
    const double scale =
        std::min(double(contract::HEIGHT) / picture.height, double(contract::WIDTH) / picture.width);
    const int height = std::max(int(std::nearbyint(picture.height * scale)), 1);
    const int width = std::max(int(std::nearbyint(picture.width * scale)), 1);
    const auto engine = open_engine(model);
    const Outputs found = engine->run(to_input(fits ? picture : resize(picture, height, width)).data());

    const int count = *reinterpret_cast<const std::int32_t*>(found.at("num_detections").data());
    const auto* boxes = reinterpret_cast<const float*>(found.at("boxes").data());
    const auto* scores = reinterpret_cast<const float*>(found.at("scores").data());
    const auto* labels = reinterpret_cast<const std::int32_t*>(found.at("labels").data());
    const float limits[2] = {float(picture.width), float(picture.height)};
    const float factors[2] = {float(picture.width) / width, float(picture.height) / height};
    for (int index = 0; index < count; ++index) {
        const auto name = contract::NAMES.find(labels[index]);
        float box[4];
        for (int side = 0; side < 4; ++side)
            box[side] = std::clamp(boxes[4 * index + side] * factors[side % 2], 0.0f, limits[side % 2]);
        if (name == contract::NAMES.end() || box[2] <= box[0] || box[3] <= box[1]) continue;
        std::printf("%.3f %s %.1f %.1f %.1f %.1f\n", scores[index], name->second, box[0], box[1], box[2], box[3]);
    }
    return 0;
}

int main(int count, char** arguments) {
    if (count != 3) {
        std::cerr << "usage: detect MODEL PICTURE.ppm\n";
        return 2;
    }
    try {
        return detect(arguments[1], arguments[2]);
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 1;
    }
}
