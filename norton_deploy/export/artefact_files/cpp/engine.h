// What runs the graph: onnxruntime_engine.cpp or tensorrt_engine.cpp, as CMake's ENGINE says.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

// Output name -> its values, row by row, as they lie in memory; shapes and types are in contract.h.
using Outputs = std::map<std::string, std::vector<char>>;

class Engine {
public:
    virtual ~Engine() = default;
    // `input` has contract::INPUT_BYTES bytes.
    virtual Outputs run(const void* input) = 0;
};

// Throws std::exception where the file cannot be opened.
std::unique_ptr<Engine> open_engine(const std::string& path);
